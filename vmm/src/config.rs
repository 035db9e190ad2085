//! What was asked for → what will be built: every check that needs no host, with words for people. Only [`separate()`]
//! looks at files, and [`validate`] at one with a template of processors.

mod boot;
mod console;
mod hotplug;
mod net;
mod pmem;
mod separate;
mod vhost_user;

use std::collections::HashSet;
use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use bedplate_api::vmm::{
    Balloon, ChunkSource, CpuConfig, CpuConfigSource, CpuTemplate, Drive, HugePages, IoEngine, MachineConfig,
    RateLimiter, TokenBucket, VmConfig, Vsock,
};
use bedplate_devices::virtio::balloon::BalloonConfig;
use bedplate_devices::virtio::block::Cache;
use bedplate_devices::virtio::limiter::{BucketConfig, LimiterConfig, LimiterUpdate};
use bedplate_devices::virtio::net::MAX_PAIRS;

pub use self::boot::{BootSourceError, boot_source};
pub use self::console::{ConsoleConfig, ConsoleConfigError, console};
pub use self::hotplug::{HotplugConfig, HotplugError, memory_hotplug};
use self::net::MIN_MTU;
pub use self::net::{MMDS_ADDRESS, NetConfig, NetLink, apart, mmds_address, net, nets};
pub use self::pmem::{PmemConfig, PmemError, pmem, root_device};
pub use self::separate::{Held, separate};
pub use self::vhost_user::{BackendDriveConfig, DiskConfig, FileSystemConfig, VhostUserConfigError, disk, file_system};
use crate::boot::Boot;
use crate::files;
use crate::json;
use crate::kvm::{self, Topology};
use crate::memory::Pages;

/// vCPUs of one VM, at most: as many as Firecracker gives, and as the hot-plug registers have bits for.
pub const MAX_VCPUS: u8 = bedplate_devices::platform::MAX_VCPUS;
/// MiB of RAM, at least: below it not even a small kernel fits.
pub const MIN_MEMORY_MIB: u64 = 16;
/// MiB of RAM, at most: a TiB, far from the end of what a processor addresses.
pub const MAX_MEMORY_MIB: u64 = 1 << 20;
/// Bytes of a file with a template: some hundred modifiers, of a hundred bytes each.
const MAX_TEMPLATE: u64 = 1 << 20;
/// Drives, network interfaces, pmem devices, file systems and the five others share 31 slots of the PCI bus.
const MAX_DEVICES: usize = 31;
/// Context ids below are the host's and the hypervisor's.
const FIRST_GUEST_CID: u32 = 3;

/// A VM that can be built, as far as can be said without the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// vCPUs and cores, with those that may come later.
    pub topology: Topology,
    /// vCPUs that are there from the start.
    pub vcpus: u8,
    /// What the processors are.
    pub kvm: kvm::VmConfig,
    /// RAM.
    pub memory_mib: u64,
    /// What it is made of.
    pub pages: Pages,
    /// Kernel, initial RAM disk, command line; or firmware.
    pub boot: Boot,
    /// Root device first.
    pub drives: Vec<DiskConfig>,
    /// Network interfaces.
    pub nets: Vec<NetConfig>,
    /// Files in the guest's address space.
    pub pmems: Vec<PmemConfig>,
    /// Directories that backends share with the guest.
    pub filesystems: Vec<FileSystemConfig>,
    /// Sockets between host and guest.
    pub vsock: Option<VsockConfig>,
    /// A source of randomness.
    pub entropy: Option<EntropyConfig>,
    /// A memory balloon; where nobody asked for one, none if there is no room for it, or with huge pages.
    pub balloon: Option<BalloonConfig>,
    /// Memory that can be added.
    pub hotplug: Option<HotplugConfig>,
    /// A virtio console.
    pub console: Option<ConsoleConfig>,
}

impl Config {
    /// The drives that are files.
    pub fn files(&self) -> impl Iterator<Item = &DriveConfig> {
        self.drives.iter().filter_map(DiskConfig::file)
    }

    /// How many virtio devices the VM starts with.
    pub fn devices(&self) -> usize {
        let single = [
            self.vsock.is_some(),
            self.entropy.is_some(),
            self.balloon.is_some(),
            self.hotplug.is_some(),
            self.console.is_some(),
        ];
        let lists = [self.drives.len(), self.nets.len(), self.filesystems.len(), self.pmems.len()];
        lists.into_iter().sum::<usize>() + single.into_iter().filter(|is_there| *is_there).count()
    }

    /// Whether other processes work in guest memory.
    pub fn has_backends(&self) -> bool {
        let disks = self.drives.iter().any(|disk| disk.file().is_none());
        disks || !self.filesystems.is_empty() || self.nets.iter().any(|net| matches!(net.link, NetLink::Backend(_)))
    }
}

/// One disk that is a file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct DriveConfig {
    pub id: String,
    pub path: PathBuf,
    pub read_only: bool,
    pub cache: Cache,
    pub engine: IoEngine,
    pub limits: LimiterConfig,
    pub chunk_source: Option<ChunkSource>,
}

/// A source of randomness.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct EntropyConfig {
    pub limits: LimiterConfig,
}

/// Sockets between host and guest.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct VsockConfig {
    pub cid: u32,
    pub path: PathBuf,
}

/// What cannot be built.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ConfigError {
    #[error("there is no boot source: set boot-source with kernel_image_path")]
    NoBootSource,
    #[error(transparent)]
    BootSource(#[from] BootSourceError),
    #[error("vcpu_count {0} is not offered: give 1 to {MAX_VCPUS}")]
    Vcpus(u8),
    #[error("mem_size_mib {0} is not offered: give {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}")]
    Memory(u64),
    #[error(
        "max_vcpu_count {max} is not offered with vcpu_count {count}: give {count} to {MAX_VCPUS}, or leave it out"
    )]
    MaxVcpus { count: u8, max: u8 },
    #[error("vcpu_count {0} with smt leaves a core with one thread: give 1 or an even number")]
    OddVcpus(u8),
    #[error("max_vcpu_count {max} with smt is filled core by core: give vcpu_count {count} and it even numbers")]
    OddMaxVcpus { count: u8, max: u8 },
    #[error("mem_size_mib {0} is not a number of huge pages of 2 MiB: give an even number")]
    OddMemory(u64),
    #[error(
        "cpu_template {0:?} and cpu_baseline both name a processor: give the first as None, or leave the second out"
    )]
    Template(CpuTemplate),
    #[error("cpu-config {path}: {source}; correct it")]
    CpuConfigFile { path: String, source: io::Error },
    #[error(
        "MMDS config error: The list of network interface IDs that allow forwarding MMDS requests is empty: name one in \
         network_interfaces"
    )]
    MmdsNowhere,
    #[error("MMDS config error: there is no network interface {0:?}: configure it first, or take it off the list")]
    MmdsInterface(String),
    #[error(
        "MMDS config error: The MMDS IPv4 address is not link local: {0}; give one from 169.254.1.0 to 169.254.254.255"
    )]
    MmdsAddress(Ipv4Addr),
    #[error("network interface {id:?}: mtu {mtu} is not offered: give {MIN_MTU} to 65535")]
    Mtu { id: String, mtu: u16 },
    #[error("network interface {id:?}: queue_pairs {pairs} is not offered: give 1 to {MAX_PAIRS}, or leave it out")]
    QueuePairs { id: String, pairs: usize },
    #[error(
        "network interface {0:?}: vhost and rate limiters exclude each other, because the host's kernel carries the frames: \
         leave one of them out, or limit the tap (`tc`)"
    )]
    VhostLimits(String),
    #[error(
        "MMDS config error: network interface {0:?} has vhost or a socket, so that nobody sees the guest's requests: name \
         another one, or give it a tap without vhost"
    )]
    VhostMmds(String),
    #[error("{what} {name:?} exists twice: give each its own")]
    Twice { what: &'static str, name: String },
    #[error("{what} {name:?} is not a name: give 1 to 64 letters, digits, underscores and hyphens")]
    Name { what: &'static str, name: String },
    /// It begins as Firecracker says it.
    #[error("Drive config error: A root block device already exists: of {0:?} and {1:?}, set is_root_device for one")]
    TwoRoots(String, String),
    #[error(
        "{what} {first:?} and {second:?} are the same file, {path}, which one of them may write: give each its own, or \
         set is_read_only (of a pmem device: read_only) for both"
    )]
    SharedFile { what: &'static str, first: String, second: String, path: PathBuf },
    #[error("drive {id:?}: partuuid {partuuid:?} is not hexadecimal digits and hyphens")]
    PartUuid { id: String, partuuid: String },
    /// Firecracker's words.
    #[error("Network config error: The MAC address is already in use: {0}")]
    MacInUse(String),
    #[error("network interface {id:?}: guest_mac {mac:?} is not a unicast MAC address such as 06:00:ac:10:00:02")]
    Mac { id: String, mac: String },
    #[error(
        "network interface {0:?}: name a tap device (host_dev_name) or the socket of a vhost-user backend, one of the two"
    )]
    OneLink(String),
    #[error(
        "network interface {id:?}: {what} and socket exclude each other, because a vhost-user backend carries the frames: \
         leave one of them out"
    )]
    SocketExcludes { id: String, what: &'static str },
    #[error(
        "network interface {id:?}: host_dev_name {name:?} is not the name of a tap device: give 1 to 15 characters"
    )]
    Tap { id: String, name: String },
    #[error("vsock: guest_cid {0} is reserved: give {FIRST_GUEST_CID} or more, below 4294967295")]
    Cid(u32),
    #[error(transparent)]
    Hotplug(#[from] HotplugError),
    #[error(transparent)]
    Pmem(#[from] PmemError),
    #[error(transparent)]
    Console(#[from] ConsoleConfigError),
    #[error(transparent)]
    VhostUser(#[from] VhostUserConfigError),
    /// Firecracker's words.
    #[error("Amount of pages requested is too large.")]
    Balloon,
    #[error("mem_size_mib {memory} is less than amount_mib of the balloon, {balloon}: make the balloon smaller first")]
    MemoryBelowBalloon { memory: u64, balloon: u32 },
    #[error(
        "a balloon would give back pages that huge_pages 2M has reserved, and might not get them again: leave one out"
    )]
    BalloonOfHugePages,
    #[error(
        "a vhost-user backend could give back pages that huge_pages 2M has reserved, and they might not be had again: use Transparent, \
         or leave huge_pages out"
    )]
    BackendOfHugePages,
    #[error("{what}: the path is empty: name a file")]
    EmptyPath { what: String },
    #[error("{0} devices are too many: the PCI bus has room for {MAX_DEVICES}")]
    TooManyDevices(usize),
}

/// Checks `spec`.
///
/// # Errors
/// The first thing in it that cannot be built.
pub fn validate(spec: &VmConfig) -> Result<Config, ConfigError> {
    let source = spec.boot_source.as_ref().ok_or(ConfigError::NoBootSource)?;
    machine(&spec.machine_config)?;
    distinct("drive_id", spec.drives.iter().map(|d| d.drive_id.as_str()))?;
    let nets = nets(spec)?;
    if let Some(mmds) = &spec.mmds_config {
        mmds_address(mmds, &spec.network_interfaces)?;
    }
    distinct("pmem id", spec.pmem.iter().map(|p| p.id.as_str()))?;
    distinct("file system tag", spec.filesystems.iter().map(|f| f.tag.as_str()))?;
    distinct("vhost-user socket", vhost_user::sockets(spec))?;
    let root = root_device(&spec.drives, &spec.pmem)?;
    let boot = boot_source(source, root.as_ref())?;
    let mut drives: Vec<_> = spec.drives.iter().collect();
    drives.sort_by_key(|drive| !drive.is_root_device);
    let memory_mib = spec.machine_config.mem_size_mib;
    let max_vcpus = spec.machine_config.max_vcpu_count.unwrap_or(spec.machine_config.vcpu_count);
    let template = match spec.cpu_config {
        Some(_) => CpuTemplate::None,
        None => spec.machine_config.cpu_template.unwrap_or_default(),
    };
    let mut config = Config {
        topology: Topology {
            vcpus: max_vcpus,
            threads_per_core: if spec.machine_config.smt && max_vcpus > 1 { 2 } else { 1 },
        },
        vcpus: spec.machine_config.vcpu_count,
        kvm: kvm::VmConfig {
            baseline: spec.machine_config.cpu_baseline,
            cpu: spec.cpu_config.as_ref().map_or_else(|| Ok(kvm::changes(template)), cpu)?,
            template,
            log_dirty_pages: spec.machine_config.track_dirty_pages,
        },
        memory_mib,
        pages: match spec.machine_config.huge_pages {
            HugePages::None => Pages::Host,
            HugePages::Transparent => Pages::Transparent,
            HugePages::Of2Mib => Pages::Huge,
        },
        boot,
        drives: drives.into_iter().map(disk).collect::<Result<_, _>>()?,
        nets,
        pmems: spec.pmem.iter().map(pmem).collect::<Result<_, _>>()?,
        filesystems: spec.filesystems.iter().map(file_system).collect::<Result<_, _>>()?,
        vsock: spec.vsock.as_ref().map(vsock).transpose()?,
        entropy: spec.entropy.as_ref().map(|entropy| EntropyConfig { limits: limits(entropy.rate_limiter) }),
        balloon: spec.balloon.as_ref().map(|spec| balloon(spec, memory_mib)).transpose()?,
        hotplug: spec.memory_hotplug.as_ref().map(memory_hotplug).transpose()?,
        console: spec.console.as_ref().map(console).transpose()?,
    };
    let devices = config.devices();
    match (&config.balloon, config.pages) {
        // What it gives back, another VM could reserve.
        (Some(_), Pages::Huge) => return Err(ConfigError::BalloonOfHugePages),
        // A backend could do the same, and a page that cannot be had again ends us.
        (_, Pages::Huge) if config.has_backends() => return Err(ConfigError::BackendOfHugePages),
        (None, Pages::Host | Pages::Transparent) if devices < MAX_DEVICES => {
            config.balloon = Some(BalloonConfig { reporting: true, ..BalloonConfig::default() });
        }
        _ => {}
    }
    if devices > MAX_DEVICES { Err(ConfigError::TooManyDevices(devices)) } else { Ok(config) }
}

/// Checks the memory balloon of a VM with so much memory.
///
/// # Errors
/// It is larger than the memory.
pub fn balloon(balloon: &Balloon, memory_mib: u64) -> Result<BalloonConfig, ConfigError> {
    Ok(BalloonConfig {
        target: balloon_pages(balloon.amount_mib, memory_mib)?,
        deflate_on_oom: balloon.deflate_on_oom,
        stats_interval: Duration::from_secs(balloon.stats_polling_interval_s.into()),
        hinting: balloon.free_page_hinting,
        reporting: balloon.free_page_reporting,
    })
}

/// Pages of a balloon of `mib` MiB in a VM with so much memory.
///
/// # Errors
/// It is larger than the memory.
pub fn balloon_pages(mib: u32, memory_mib: u64) -> Result<u32, ConfigError> {
    // A MiB has 256 pages of 4 KiB.
    mib.checked_mul(256).filter(|_| u64::from(mib) <= memory_mib).ok_or(ConfigError::Balloon)
}

/// Checks that a balloon fits into so much memory.
///
/// # Errors
/// It does not.
pub fn room_for(balloon: &Balloon, memory_mib: u64) -> Result<(), ConfigError> {
    if u64::from(balloon.amount_mib) <= memory_mib {
        return Ok(());
    }
    Err(ConfigError::MemoryBelowBalloon { memory: memory_mib, balloon: balloon.amount_mib })
}

/// Checks vCPUs and memory.
///
/// # Errors
/// Out of range, or not offered.
pub fn machine(spec: &MachineConfig) -> Result<(), ConfigError> {
    if !(1..=MAX_VCPUS).contains(&spec.vcpu_count) {
        return Err(ConfigError::Vcpus(spec.vcpu_count));
    }
    let (count, max) = (spec.vcpu_count, spec.max_vcpu_count.unwrap_or(spec.vcpu_count));
    if !(count..=MAX_VCPUS).contains(&max) {
        return Err(ConfigError::MaxVcpus { count, max });
    }
    if spec.smt && max > count && (!count.is_multiple_of(2) || !max.is_multiple_of(2)) {
        return Err(ConfigError::OddMaxVcpus { count, max });
    }
    if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&spec.mem_size_mib) {
        return Err(ConfigError::Memory(spec.mem_size_mib));
    }
    if spec.smt && spec.vcpu_count > 1 && !spec.vcpu_count.is_multiple_of(2) {
        return Err(ConfigError::OddVcpus(spec.vcpu_count));
    }
    if spec.huge_pages != HugePages::None && !spec.mem_size_mib.is_multiple_of(2) {
        return Err(ConfigError::OddMemory(spec.mem_size_mib));
    }
    match spec.cpu_template {
        Some(template) if template != CpuTemplate::None && spec.cpu_baseline.is_some() => {
            Err(ConfigError::Template(template))
        }
        _ => Ok(()),
    }
}

/// The template itself, wherever it stands.
fn cpu(source: &CpuConfigSource) -> Result<CpuConfig, ConfigError> {
    let path = match source {
        CpuConfigSource::Template(config) => return Ok(config.clone()),
        CpuConfigSource::Path(path) => path,
    };
    let read = || json::object(&files::read_all(path.as_ref(), MAX_TEMPLATE)?).map_err(io::Error::other);
    read().map_err(|source| ConfigError::CpuConfigFile { path: path.clone(), source })
}

/// Checks a drive that is a file, all but its name and partition.
fn drive(drive: &Drive, path_on_host: &str, cache: Cache) -> Result<DriveConfig, ConfigError> {
    let id = drive.drive_id.clone();
    let path = path(&format!("drive {id:?}: path_on_host"), path_on_host)?;
    let (engine, limits) = (drive.io_engine.unwrap_or(IoEngine::Sync), limits(drive.rate_limiter));
    let chunk_source = drive.chunk_source.clone();
    if let Some(source) = &chunk_source {
        self::path(&format!("drive {id:?}: chunk_source"), &source.socket)?;
    }
    let read_only = drive.is_read_only.unwrap_or(false);
    Ok(DriveConfig { id, path, read_only, cache, engine, limits, chunk_source })
}

/// Any limiter can be built.
pub fn limits(limiter: Option<RateLimiter>) -> LimiterConfig {
    let LimiterUpdate { bandwidth, operations } = limits_update(limiter.unwrap_or_default());
    LimiterConfig { bandwidth, operations }
}

/// What a change of a limiter asks for.
pub fn limits_update(limiter: RateLimiter) -> LimiterUpdate {
    let bucket = |bucket: TokenBucket| BucketConfig {
        size: bucket.size,
        one_time_burst: bucket.one_time_burst.unwrap_or(0),
        refill_time: Duration::from_millis(bucket.refill_time),
    };
    LimiterUpdate { bandwidth: limiter.bandwidth.map(bucket), operations: limiter.ops.map(bucket) }
}

/// Checks the vsock device.
///
/// # Errors
/// Its context id or path cannot be.
pub fn vsock(vsock: &Vsock) -> Result<VsockConfig, ConfigError> {
    if !(FIRST_GUEST_CID..u32::MAX).contains(&vsock.guest_cid) {
        return Err(ConfigError::Cid(vsock.guest_cid));
    }
    Ok(VsockConfig { cid: vsock.guest_cid, path: path("vsock: uds_path", &vsock.uds_path)? })
}

fn path(what: &str, path: &str) -> Result<PathBuf, ConfigError> {
    if path.is_empty() { Err(ConfigError::EmptyPath { what: what.into() }) } else { Ok(path.into()) }
}

fn name(what: &'static str, name: &str) -> Result<String, ConfigError> {
    let good =
        (1..=64).contains(&name.len()) && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
    if good { Ok(name.into()) } else { Err(ConfigError::Name { what, name: name.into() }) }
}

fn distinct<'a>(what: &'static str, names: impl Iterator<Item = &'a str>) -> Result<(), ConfigError> {
    let mut seen = HashSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(ConfigError::Twice { what, name: name.into() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> VmConfig {
        let text = format!(r#"{{"boot-source": {{"kernel_image_path": "k"}} {text}}}"#);
        serde_json::from_str(&text).unwrap()
    }

    fn error(text: &str) -> String {
        validate(&spec(text)).unwrap_err().to_string()
    }

    #[test]
    fn the_root_device_comes_first_and_is_on_the_command_line() {
        let config = validate(&spec(
            r#", "drives": [{"drive_id": "data", "path_on_host": "d", "is_root_device": false},
                           {"drive_id": "root", "path_on_host": "r", "is_root_device": true, "is_read_only": true}]"#,
        ))
        .unwrap();
        assert_eq!(config.drives.iter().map(DiskConfig::id).collect::<Vec<_>>(), ["root", "data"]);
        let Boot::Kernel(kernel) = config.boot else { panic!("{:?}", config.boot) };
        assert!(kernel.cmdline.ends_with("root=/dev/vda ro"), "{}", kernel.cmdline);
    }

    #[test]
    fn what_cannot_be_built_is_named() {
        assert!(validate(&VmConfig::default()).unwrap_err().to_string().contains("boot source"));
        assert!(error(r#", "machine-config": {"vcpu_count": 33, "mem_size_mib": 64}"#).contains("vcpu_count 33"));
        assert!(error(r#", "machine-config": {"vcpu_count": 0, "mem_size_mib": 64}"#).contains("vcpu_count 0"));
        assert!(error(r#", "machine-config": {"vcpu_count": 1, "mem_size_mib": 1}"#).contains("mem_size_mib 1"));
        let machine =
            |more: &str| error(&format!(r#", "machine-config": {{"vcpu_count": 3, "mem_size_mib": 65{more}}}"#));
        assert!(machine(r#", "smt": true"#).contains("vcpu_count 3 with smt"));
        assert!(machine(r#", "huge_pages": "2M""#).contains("even"));
        let more = |count: u8, max: u8, more: &str| {
            let machine = format!(r#"{{"vcpu_count": {count}, "max_vcpu_count": {max}, "mem_size_mib": 64{more}}}"#);
            error(&format!(r#", "machine-config": {machine}"#))
        };
        assert!(more(3, 2, "").contains("max_vcpu_count 2") && more(3, 33, "").contains("3 to 32"));
        assert!(more(1, 4, r#", "smt": true"#).contains("even") && more(2, 5, r#", "smt": true"#).contains("even"));
        assert!(machine(r#", "cpu_template": "T2CL", "cpu_baseline": "x86-64-v2""#).contains("cpu_template T2CL and"));
        assert!(error(r#", "cpu-config": "/nowhere/template""#).contains("cpu-config /nowhere/template: No such file"));
        let drive = r#"{"drive_id": "a", "path_on_host": "d", "is_root_device": true}"#;
        assert!(error(&format!(r#", "drives": [{drive}, {drive}]"#)).contains("exists twice"));
        let other = drive.replace(r#""a""#, r#""b""#);
        assert!(error(&format!(r#", "drives": [{drive}, {other}]"#)).contains("A root block device already exists"));
        assert!(error(&format!(r#", "drives": [{}]"#, drive.replace(r#""a""#, r#""a/b""#))).contains("not a name"));
        assert!(error(r#", "vsock": {"guest_cid": 2, "uds_path": "v"}"#).contains("guest_cid 2"));
        let mmds = |more: &str| {
            error(&format!(
                r#", "network-interfaces": [{{"iface_id": "e", "host_dev_name": "t"}}], "mmds-config": {{{more}}}"#
            ))
        };
        assert!(mmds(r#""network_interfaces": []"#).contains("is empty"));
        assert!(mmds(r#""network_interfaces": ["e", "f"]"#).contains(r#"no network interface "f""#));
        for address in ["10.0.0.1", "169.254.0.9", "169.254.255.1"] {
            assert!(mmds(&format!(r#""network_interfaces": ["e"], "ipv4_address": "{address}""#)).contains(address));
        }
        let small = r#", "network-interfaces": [{"iface_id": "e", "host_dev_name": "t", "mtu": 67}]"#;
        assert!(error(small).contains("mtu 67"));
        for mac in ["", "06:00:00:00:00", "01:00:00:00:00:01", "06:00:00:00:00:0g", "+6:00:00:00:00:00"] {
            let text =
                format!(r#", "network-interfaces": [{{"iface_id": "e", "host_dev_name": "t", "guest_mac": "{mac}"}}]"#);
            assert!(error(&text).contains("guest_mac"), "{mac}");
        }
    }

    #[test]
    fn a_vm_reports_free_pages_unless_it_is_told_not_to() {
        let balloon = |text: &str| validate(&spec(text)).unwrap().balloon.unwrap();
        assert_eq!(balloon(""), BalloonConfig { reporting: true, ..BalloonConfig::default() });
        let asked = r#", "balloon": {"amount_mib": 16, "deflate_on_oom": true, "stats_polling_interval_s": 5 X}"#;
        assert_eq!(
            balloon(&asked.replace('X', "")),
            BalloonConfig {
                target: 4096,
                deflate_on_oom: true,
                stats_interval: Duration::from_secs(5),
                hinting: false,
                reporting: true
            }
        );
        assert!(!balloon(&asked.replace('X', r#", "free_page_reporting": false"#)).reporting);
        assert!(error(&asked.replace("16", "129").replace('X', "")).contains("too large"));
        let huge = r#", "machine-config": {"vcpu_count": 1, "mem_size_mib": 128, "huge_pages": "2M"}"#;
        assert_eq!(validate(&spec(huge)).unwrap().balloon, None);
        assert!(error(&format!("{huge}{}", asked.replace('X', ""))).contains("leave one out"));
    }
}
