//! What a VM boots: files, command line, and the VMM's configuration.

use std::path::{Path, PathBuf};

use bedplate_api::image::Firmware;
use bedplate_api::vmm::{BootSource, Drive, Entropy, MachineConfig, NetworkInterface, VmConfig};
use bedplate_images::{Store, StoreError};

use super::Args;
use super::source::Source;
use crate::net::Net;

/// Nothing that can be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// No kernel in the image, and none given.
    #[error(
        "no kernel was found in {image}, and no boot loader; name a kernel with --kernel (and --initrd), or with \
         --firmware a BIOS that shall look for itself"
    )]
    NoKernel {
        /// The image.
        image: String,
    },
    /// Its boot loader is for firmware that cannot be had.
    #[error(
        "{image} starts by its own boot loader under UEFI firmware, which bedplate-vmm cannot run yet (no kernel was found \
         in the image): take its kernel out and name it with --kernel (and --initrd)"
    )]
    NeedsUefi {
        /// The image.
        image: String,
    },
    /// The firmware for it is not on this machine.
    #[error(
        "{image} starts by its own boot loader, and its firmware is not there: {path} cannot be read ({source}); install \
         Debian's package seabios, or name a BIOS with --firmware"
    )]
    NoFirmware {
        /// The image.
        image: String,
        /// Where it was looked for.
        path: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// There is no command line to add words to.
    #[error(
        "{image} starts by its own boot loader, which has its own command line: leave --cmdline out, or name a --kernel"
    )]
    NoCmdline {
        /// The image.
        image: String,
    },
    /// A file that is not there.
    #[error("cannot read {}: {source}", path.display())]
    File {
        /// As given.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The kernel in the image cannot be taken out.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Where Debian's package `seabios` has it.
const SEABIOS: &str = "/usr/share/seabios/bios-256k.bin";

/// What a VM begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Start {
    /// A kernel.
    Kernel(Kernel),
    /// A BIOS, which starts the disk's own boot loader.
    Firmware(PathBuf),
}

/// What to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kernel {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    /// The image's own command line.
    pub cmdline: String,
}

/// The kernel or firmware that was named, else the kernel in the image, which is written to `dir`, else firmware for the
/// image's boot loader.
pub(super) fn files(args: &Args, store: &Store, source: &Source, dir: &Path) -> Result<Start, BootError> {
    if let Some(firmware) = &args.firmware {
        return Ok(Start::Firmware(readable(firmware)?));
    }
    let boot = source.manifest.boot.as_ref();
    let cmdline = boot.map(|boot| boot.cmdline.clone()).unwrap_or_default();
    if let Some(kernel) = &args.kernel {
        let initrd = args.initrd.as_deref().map(readable).transpose()?;
        return Ok(Start::Kernel(Kernel { kernel: readable(kernel)?, initrd, cmdline }));
    }
    let Some(boot) = boot else {
        let (image, has_words) = (args.image.clone(), args.cmdline.is_some());
        return firmware(image, has_words, source.manifest.firmware, SEABIOS).map(Start::Firmware);
    };
    let extract = |part: &String| {
        let path = dir.join(part);
        store.materialise(&source.digest, part, &path).map(|()| path)
    };
    let initrd = boot.initrd.as_ref().map(extract).transpose()?;
    Ok(Start::Kernel(Kernel { kernel: extract(&boot.kernel)?, initrd, cmdline }))
}

/// The firmware for an image without a kernel, if it is marked for one that is at `path`.
fn firmware(image: String, has_words: bool, mark: Option<Firmware>, path: &'static str) -> Result<PathBuf, BootError> {
    match mark {
        None => Err(BootError::NoKernel { image }),
        Some(Firmware::Uefi) => Err(BootError::NeedsUefi { image }),
        Some(Firmware::Bios | Firmware::Either) if has_words => Err(BootError::NoCmdline { image }),
        Some(Firmware::Bios | Firmware::Either) => match regular(Path::new(path)) {
            Ok(path) => Ok(path),
            Err(source) => Err(BootError::NoFirmware { image, path, source }),
        },
    }
}

/// The absolute path of a file that can be read.
fn readable(path: &Path) -> Result<PathBuf, BootError> {
    regular(path).map_err(|source| BootError::File { path: path.to_owned(), source })
}

fn regular(path: &Path) -> std::io::Result<PathBuf> {
    // Asked first: to open a FIFO waits for whoever writes to it.
    if !std::fs::metadata(path)?.is_file() {
        return Err(std::io::Error::other("this is no regular file"));
    }
    std::fs::File::open(path)?;
    std::path::absolute(path)
}

/// The VMM's configuration for the VM that `args` ask for.
pub(super) fn config(args: &Args, start: Start, disk: PathBuf, net: Option<&Net>) -> VmConfig {
    let text = |path: PathBuf| path.to_string_lossy().into_owned();
    let interface = net.map(|net| NetworkInterface {
        iface_id: "eth0".to_owned(),
        host_dev_name: Some(net.tap().to_owned()),
        socket: None,
        guest_mac: Some(net.mac.clone()),
        mtu: None,
        rx_rate_limiter: None,
        tx_rate_limiter: None,
        queue_pairs: None,
        vhost: false,
    });
    let boot_source = match start {
        Start::Kernel(kernel) => BootSource {
            boot_args: Some(cmdline(&kernel.cmdline, args.name.as_deref(), args.cmdline.as_deref())),
            kernel_image_path: Some(text(kernel.kernel)),
            initrd_path: kernel.initrd.map(text),
            ..BootSource::default()
        },
        Start::Firmware(path) => BootSource { firmware_path: Some(text(path)), ..BootSource::default() },
    };
    let names_root = boot_source.names_root();
    VmConfig {
        boot_source: Some(boot_source),
        drives: vec![Drive {
            drive_id: "disk".to_owned(),
            path_on_host: Some(text(disk)),
            socket: None,
            // The VMM adds `root=` for a root device; an image that names its root itself knows better.
            is_root_device: !names_root,
            partuuid: None,
            is_read_only: None,
            cache_type: Default::default(),
            io_engine: None,
            rate_limiter: None,
            chunk_source: None,
        }],
        machine_config: MachineConfig { vcpu_count: args.cpus, mem_size_mib: args.memory, ..MachineConfig::default() },
        network_interfaces: interface.into_iter().collect(),
        entropy: Some(Entropy::default()),
        ..VmConfig::default()
    }
}

/// The image's own words, those that make it fit for this console where it has none of the kind, and the person's.
fn cmdline(image: &str, host_name: Option<&str>, added: Option<&str>) -> String {
    // What stands after `--` is for init, so ours goes before it.
    let (kernel, init) = match image.split_once(" -- ") {
        Some((kernel, init)) => (kernel, Some(init)),
        None => (image, None),
    };
    let mut words: Vec<&str> = kernel.split_whitespace().collect();
    let mut default = |prefix: &str, word: &'static str| {
        if !words.iter().any(|present| present.starts_with(prefix)) {
            words.push(word);
        }
    };
    default("console=ttyS0", "console=ttyS0");
    default("reboot=", "reboot=k");
    // A guest that panicked ends, instead of standing there.
    default("panic=", "panic=-1");
    let host_name = host_name.map(|name| format!("systemd.hostname={name}"));
    words.extend(host_name.as_deref());
    words.extend(added.unwrap_or_default().split_whitespace());
    let mut line = words.join(" ");
    if let Some(init) = init {
        line += &format!(" -- {init}");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_gets_what_it_lacks_and_keeps_what_it_has() {
        assert_eq!(cmdline("", None, None), "console=ttyS0 reboot=k panic=-1");
        assert_eq!(
            cmdline("root=UUID=1 ro console=tty0 console=ttyS0,115200 panic=5", Some("web"), Some("quiet  single")),
            "root=UUID=1 ro console=tty0 console=ttyS0,115200 panic=5 reboot=k systemd.hostname=web quiet single"
        );
    }

    #[test]
    fn a_kernel_is_a_regular_file() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).unwrap();
        assert!(readable(&fifo).unwrap_err().to_string().ends_with("no regular file"));
        assert!(readable(dir.path()).unwrap_err().to_string().ends_with("no regular file"));
        assert!(readable(&dir.path().join("none")).unwrap_err().to_string().contains("No such file"));
    }

    #[test]
    fn an_image_without_a_kernel_gets_the_firmware_that_it_is_marked_for() {
        let of = |words, mark, path| firmware("x".into(), words, mark, path);
        for mark in [Firmware::Bios, Firmware::Either] {
            assert_eq!(of(false, Some(mark), "/etc/passwd").unwrap(), Path::new("/etc/passwd"));
            let missing = of(false, Some(mark), "/nowhere/bios").unwrap_err().to_string();
            assert!(missing.contains("/nowhere/bios") && missing.contains("package seabios"), "{missing}");
            assert!(matches!(of(true, Some(mark), "/etc/passwd"), Err(BootError::NoCmdline { .. })));
        }
        assert!(matches!(of(false, Some(Firmware::Uefi), "/etc/passwd"), Err(BootError::NeedsUefi { .. })));
        assert!(matches!(of(false, None, "/etc/passwd"), Err(BootError::NoKernel { .. })));
    }

    #[test]
    fn words_for_init_stay_last() {
        assert_eq!(cmdline("ro -- -v", None, Some("quiet")), "ro console=ttyS0 reboot=k panic=-1 quiet -- -v");
    }
}
