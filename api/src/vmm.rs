//! Between a node agent, or a person, and one VM process: Firecracker's paths and JSON for what both have.
//!
//! HTTP over the process's Unix socket. A change that succeeds answers 204 without a body; every error answers with
//! [`Fault`], 400 unless another status is named.
//!
//! | method and path | body → answer |
//! | --- | --- |
//! | `GET /` | → [`InstanceInfo`] |
//! | `GET /version` | → [`Version`] |
//! | `GET /vm/config` | → [`VmConfig`], with `null` for what Firecracker has and nobody set |
//! | `PATCH /vm` | [`VmStateChange`] |
//! | `PUT /actions` | [`Action`] |
//! | `GET`, `PUT`, `PATCH /mmds` | any JSON: the guest's metadata; `PATCH` merges (RFC 7396) |
//! | `PATCH /drives/{id}` | [`DrivePatch`]; after the start only |
//! | `PATCH /network-interfaces/{id}` | [`NetworkInterfacePatch`]; after the start only |
//! | `DELETE /drives/{id}`, `/network-interfaces/{id}` | no body; refused: devices cannot be taken away |
//! | `PATCH`, `DELETE /pmem/{id}` | [`PmemPatch`]; after the start only; `DELETE` is refused likewise |
//! | `PUT /snapshot/create`, `/snapshot/load` | [`SnapshotCreate`], [`SnapshotLoad`]; refused: there are no snapshots |
//! | `PUT /boot-source` | [`BootSource`]; before the start only, as all that follow up to `/metrics` |
//! | `GET`, `PUT`, `PATCH /machine-config` | [`MachineConfig`], or [`MachineConfigPatch`] for `PATCH` |
//! | `PUT /cpu-config` | [`CpuConfig`] |
//! | `PUT /drives/{id}` | [`Drive`] |
//! | `PUT /network-interfaces/{id}` | [`NetworkInterface`] |
//! | `PUT /pmem/{id}` | [`Pmem`] |
//! | `PUT /mmds/config` | [`MmdsConfig`] |
//! | `PUT /vsock` | [`Vsock`] |
//! | `PUT /entropy` | [`Entropy`] |
//! | `PUT /balloon` | [`Balloon`] |
//! | `PUT /serial` | [`SerialDevice`] |
//! | `PUT /logger` | [`Logger`] |
//! | `PUT /metrics` | [`Metrics`] |
//! | `PUT /hotplug/memory` | [`MemoryHotplug`] |
//! | `GET`, `PATCH /hotplug/memory` | → [`MemoryHotplugStatus`], [`MemoryHotplugUpdate`]; after the start only |
//! | `GET /balloon` | → [`Balloon`] |
//! | `PATCH /balloon` | [`BalloonUpdate`]; after the start only, as all that follow of the balloon |
//! | `GET`, `PATCH /balloon/statistics` | → [`BalloonStats`], [`BalloonStatsUpdate`] |
//! | `PATCH /balloon/hinting/start`, `/stop` | [`HintingStart`], or no body |
//! | `GET /balloon/hinting/status` | → [`HintingStatus`] |
//! | `GET /bedplate/status` | → [`Status`] |
//! | `GET /bedplate/inspect` | → [`Inspection`]; after the start only |
//! | `GET`, `PUT /bedplate/vcpus` | → [`Vcpus`], [`VcpusUpdate`]; after the start only |
//! | `PUT /bedplate/filesystems/{tag}` | [`FileSystem`]; before the start only |
//! | `PUT /bedplate/power-button` | no body; presses the ACPI power button |
//! | `PUT /bedplate/stop` | no body; ends the VM at once, the process exits with code 0 |

mod balloon;
pub mod chunks;
mod console;
mod core_dump;
mod cpu;
mod devices;
mod drive;
mod filesystem;
mod hotplug;
mod inspect;
mod limits;
mod log;
mod metadata;
mod pmem;
mod snapshot;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use balloon::{Balloon, BalloonStats, BalloonStatsUpdate, BalloonUpdate, HintingStart, HintingStatus};
pub use chunks::ChunkSource;
pub use console::{ConsoleSize, VirtioConsole};
pub use core_dump::CoreDump;
pub use cpu::{
    Bitmap, Capability, CpuBaseline, CpuConfig, CpuConfigSource, CpuidModifier, CpuidRegister, Hex, MsrModifier,
    RegisterModifier,
};
pub use devices::{DeviceStatus, MetricsLine};
pub use drive::{CacheType, Drive, DrivePatch, IoEngine};
pub use filesystem::FileSystem;
pub use hotplug::{MemoryHotplug, MemoryHotplugStatus, MemoryHotplugUpdate, Vcpus, VcpusUpdate};
pub use inspect::{ExitKind, ExitRecord, Inspection, QueueInspection, Registers, VcpuInspection};
pub use limits::{RateLimiter, TokenBucket};
pub use log::{LogLevel, Logger, Metrics};
pub use metadata::{MmdsConfig, MmdsVersion};
pub use pmem::{Pmem, PmemPatch};
pub use snapshot::{
    MemoryBackend, MemoryBackendType, NetworkOverride, RestoredPages, SnapshotCreate, SnapshotLoad, SnapshotType,
    VsockOverride,
};

/// Body of every error answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// What is wrong and what to do, for a person.
    pub fault_message: String,
}

/// Everything that makes a VM: the body of a `--config-file`. Unknown sections are for who reads it to refuse, or to name.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmConfig {
    /// Kernel, initial RAM disk and command line; or firmware.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_source: Option<BootSource>,
    /// Disks, in the order in which the guest sees them (the root device comes first).
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// vCPUs and memory.
    #[serde(default)]
    pub machine_config: MachineConfig,
    /// What the processors are, beyond `machine_config`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_config: Option<CpuConfigSource>,
    /// Network interfaces, in the order in which the guest sees them.
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterface>,
    /// Files in the guest's address space, in the order in which the guest sees them.
    #[serde(default)]
    pub pmem: Vec<Pmem>,
    /// How the guest reaches its metadata. Absent: it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mmds_config: Option<MmdsConfig>,
    /// Sockets between host and guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<Vsock>,
    /// A source of randomness for the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<Entropy>,
    /// Memory that the guest gives back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<Balloon>,
    /// Memory that can be added while the VM runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_hotplug: Option<MemoryHotplug>,
    /// Directories that vhost-user backends share with the guest, in the order in which it sees them. Ours.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub filesystems: Vec<FileSystem>,
    /// A virtio console beside the serial one. Ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<VirtioConsole>,
    /// Where the serial console goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<SerialDevice>,
    /// Where messages of the VMM go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logger: Option<Logger>,
    /// Where counters go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<Metrics>,
}

/// What the VM boots: a kernel, or firmware. One of the two is named.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// A bzImage, or an uncompressed ELF kernel, on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_image_path: Option<String>,
    /// A BIOS for PCs on the host, such as SeaBIOS, which starts the boot loader of the first disk that has one. Ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware_path: Option<String>,
    /// An initial RAM disk on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<String>,
    /// The kernel's command line. Absent: `reboot=k panic=1 console=ttyS0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
}

impl BootSource {
    /// Whether the command line says itself what the guest mounts as `/`. A root device would override that.
    pub fn names_root(&self) -> bool {
        let mut words = self.boot_args.as_deref().unwrap_or_default().split_ascii_whitespace();
        words.any(|word| word.starts_with("root="))
    }
}

/// vCPUs and memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs; of a VM that runs, those that have come included.
    pub vcpu_count: u8,
    /// How many there may be while the VM runs. Absent: `vcpu_count`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_vcpu_count: Option<u8>,
    /// RAM in MiB.
    pub mem_size_mib: u64,
    /// Two threads per core: `vcpu_count` is then 1 or even, and even where more may come.
    #[serde(default)]
    pub smt: bool,
    /// One of Firecracker's deprecated names of processors, without `cpu_baseline`. Absent: what it was; at first, `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    /// The processors have the features of this list and no others. Absent: what the host's processor and KVM offer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_baseline: Option<CpuBaseline>,
    /// KVM keeps a log of the pages that the guest writes.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Pages of the host behind the guest's RAM.
    #[serde(default)]
    pub huge_pages: HugePages,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            max_vcpu_count: None,
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            cpu_baseline: None,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
        }
    }
}

/// Firecracker's names of processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum CpuTemplate {
    /// Intel's from Skylake to Ice Lake, as Ivy Bridge.
    C3,
    /// Intel's from Skylake to Ice Lake, as Haswell.
    T2,
    /// T2 on Skylake and Cascade Lake, with the same faults.
    T2S,
    /// T2 on Cascade Lake and Ice Lake, without what [`T2A`](Self::T2A) lacks.
    T2CL,
    /// AMD's Milan, with the features of T2.
    T2A,
    /// The host's own.
    #[default]
    None,
}

/// Size of the host pages behind the guest's RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum HugePages {
    /// What the host gives to programs that do not ask (`/sys/kernel/mm/transparent_hugepage/enabled`).
    #[default]
    None,
    /// Huge pages where the host has some to spare.
    Transparent,
    /// Huge pages of 2 MiB that the host has put aside; `mem_size_mib` is even.
    #[serde(rename = "2M")]
    Of2Mib,
}

/// A change of some of [`MachineConfig`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct MachineConfigPatch {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpu_count: Option<u8>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_vcpu_count: Option<u8>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_size_mib: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smt: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<CpuTemplate>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_baseline: Option<CpuBaseline>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub track_dirty_pages: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<HugePages>,
}

/// One network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Name, unique among the interfaces.
    pub iface_id: String,
    /// Tap device on the host. Absent: there is a `socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_dev_name: Option<String>,
    /// Unix socket of a vhost-user backend that carries the frames. It excludes what `vhost` excludes, and that. Ours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// MAC address that the guest uses. Absent: one made from the name of tap or socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
    /// MTU that the guest should use, 68 or more. Absent: its own choice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// How much the guest may receive in a time. Absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// How much it may send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
    /// Pairs of queues, 1 to 8; more than one need a tap that was made for several (`multi_queue`). Absent: one for each
    /// vCPU, up to 8, if the tap is such a one, else one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_pairs: Option<u8>,
    /// Frames are carried by the host's kernel, through vhost-net. Such an interface has no rate limiters, does not lead to
    /// the guest's metadata, and is there from the start. Absent: no.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub vhost: bool,
}

/// A change of an interface of a VM that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfacePatch {
    /// As in the path.
    pub iface_id: String,
    /// How much the guest may receive from now on; of the limits only those change that are named. Absent: as it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// How much it may send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// Sockets between host and guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's context id, 3 or more.
    pub guest_cid: u32,
    /// Unix socket on the host: connections to it reach the guest after the line `CONNECT port`, and those of the guest
    /// to a port arrive at `{uds_path}_{port}`.
    pub uds_path: String,
    /// Ignored; Firecracker deprecated it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
}

/// A source of randomness for the guest.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// How much the guest may draw in a time. Absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// Where the serial console goes, if the command line did not say it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialDevice {
    /// File that output is appended to. Absent: as on the command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<String>,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// What to do.
    pub action_type: ActionType,
}

/// Firecracker's actions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActionType {
    /// Boot.
    InstanceStart,
    /// Ask the guest to shut down. There is no keyboard: it gets the power button.
    SendCtrlAltDel,
    /// Write the counters now.
    FlushMetrics,
}

/// Pause or go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmStateChange {
    /// The state to reach.
    pub state: TargetState,
}

/// States that can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetState {
    /// No vCPU runs.
    Paused,
    /// All vCPUs run.
    Resumed,
}

/// Where the VM stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RunState {
    /// Being configured.
    #[serde(rename = "Not started")]
    NotStarted,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still.
    Paused,
}

/// Answer of `GET /`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct InstanceInfo {
    /// Always `Bedplate`.
    pub app_name: String,
    /// As given with `--id`.
    pub id: String,
    pub state: RunState,
    pub vmm_version: String,
}

/// Answer of `GET /version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Our version, under the name that Firecracker's clients look for.
    pub firecracker_version: String,
}

/// What was observed of a VM: counters since the start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// As given with `--id`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// Where it stands.
    pub state: RunState,
    /// Process id of the VMM.
    pub pid: u32,
    /// Seconds since the first vCPU instruction; 0 before it.
    pub uptime_seconds: u64,
    /// Microseconds from the time that `--start-time-us` gave to the first wait for a request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process_startup_time_us: Option<u64>,
    /// The same in processor time, from `--start-time-cpu-us`, with that of `--parent-cpu-time-us`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process_startup_time_cpu_us: Option<u64>,
    /// Why vCPUs left the guest, summed over all of them.
    pub exits: ExitCounts,
    /// The vCPUs; absent before the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<Vcpus>,
    /// What each device counts: `block_{drive_id}`, `net_{iface_id}`, `pmem_{id}`, `balloon`, `entropy`, `memory_hotplug`,
    /// `vsock`.
    #[serde(default)]
    pub devices: BTreeMap<String, DeviceStatus>,
}

/// How often vCPUs left the guest. A VMM that is older than its reader counts less.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ExitCounts {
    /// To read a port.
    pub port_read: u64,
    /// To write a port.
    pub port_write: u64,
    /// To read memory-mapped registers.
    pub mmio_read: u64,
    /// To write memory-mapped registers.
    pub mmio_write: u64,
    /// To read a model-specific register that KVM does not have.
    pub msr_read: u64,
    /// To write one.
    pub msr_write: u64,
    /// Because of a signal: a pause, a stop.
    pub interrupted: u64,
    /// For any other reason.
    pub other: u64,
    /// Port accesses, counted above, that no device answered.
    pub unknown_port: u64,
    /// Memory-mapped accesses, counted above, that no device answered.
    pub unknown_mmio: u64,
    /// Accesses to model-specific registers, counted above, that the guest got a fault for.
    pub unknown_msr: u64,
}

/// How a VM ended: the content of an exit file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exit {
    /// Class.
    pub reason: ExitReason,
    /// For a person.
    pub detail: String,
}

/// How a VM can end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest powered off.
    GuestPowerOff,
    /// The guest reset itself; a VM process does not start it again.
    GuestReset,
    /// Somebody outside stopped it.
    Stopped,
    /// The guest did what no machine can go on from.
    GuestFault,
    /// The host failed, or the VM could not be started.
    HostFault,
}

impl ExitReason {
    /// Exit code of the process.
    pub const fn code(self) -> u8 {
        match self {
            Self::GuestPowerOff | Self::GuestReset | Self::Stopped => 0,
            Self::GuestFault | Self::HostFault => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_firecracker_config_file_is_understood_and_an_unknown_field_is_refused() {
        let text = r#"{
            "boot-source": {"kernel_image_path": "vmlinux", "boot_args": "console=ttyS0"},
            "drives": [{"drive_id": "rootfs", "path_on_host": "r.ext4", "is_root_device": true, "is_read_only": false,
                        "cache_type": "Unsafe"}],
            "machine-config": {"vcpu_count": 2, "mem_size_mib": 1024},
            "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0"}],
            "vsock": {"guest_cid": 3, "uds_path": "v.sock"}, "entropy": {}
        }"#;
        let config: VmConfig = serde_json::from_str(text).unwrap();
        assert_eq!(config.machine_config.vcpu_count, 2);
        assert_eq!(config.drives[0].cache_type, CacheType::Unsafe);
        let again: VmConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);

        let error = serde_json::from_str::<VmConfig>(&text.replace("guest_cid", "guest_kid")).unwrap_err();
        assert!(error.to_string().contains("guest_kid"), "{error}");
    }
}
