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
        "no kernel was found in {image}, and bedplate-vmm boots kernels directly; name one with --kernel (and --initrd)"
    )]
    NoKernel {
        /// The image.
        image: String,
    },
    /// It has a boot loader, which needs firmware.
    #[error(
        "{image} starts by its own boot loader under {} firmware, and bedplate-vmm boots kernels directly (no kernel was \
         found in the image): take its kernel out and name it with --kernel (and --initrd)",
        firmware_name(*firmware)
    )]
    NeedsFirmware {
        /// The image.
        image: String,
        /// Which.
        firmware: Firmware,
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

fn firmware_name(firmware: Firmware) -> &'static str {
    match firmware {
        Firmware::Bios => "BIOS",
        Firmware::Uefi => "UEFI",
        Firmware::Either => "BIOS or UEFI",
    }
}

/// What to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kernel {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    /// The image's own command line.
    pub cmdline: String,
}

/// The kernel that was named, else the one in the image, which is written to `dir`.
pub(super) fn files(args: &Args, store: &Store, source: &Source, dir: &Path) -> Result<Kernel, BootError> {
    let boot = source.manifest.boot.as_ref();
    let cmdline = boot.map(|boot| boot.cmdline.clone()).unwrap_or_default();
    if let Some(kernel) = &args.kernel {
        let initrd = args.initrd.as_deref().map(readable).transpose()?;
        return Ok(Kernel { kernel: readable(kernel)?, initrd, cmdline });
    }
    let image = || args.image.clone();
    let boot = boot.ok_or_else(|| match source.manifest.firmware {
        Some(firmware) => BootError::NeedsFirmware { image: image(), firmware },
        None => BootError::NoKernel { image: image() },
    })?;
    let extract = |part: &String| {
        let path = dir.join(part);
        store.materialise(&source.digest, part, &path).map(|()| path)
    };
    let initrd = boot.initrd.as_ref().map(extract).transpose()?;
    Ok(Kernel { kernel: extract(&boot.kernel)?, initrd, cmdline })
}

/// The absolute path of a file that can be read.
fn readable(path: &Path) -> Result<PathBuf, BootError> {
    let open = || {
        // Asked first: to open a FIFO waits for whoever writes to it.
        if !std::fs::metadata(path)?.is_file() {
            return Err(std::io::Error::other("this is no regular file"));
        }
        std::fs::File::open(path)?;
        std::path::absolute(path)
    };
    open().map_err(|source| BootError::File { path: path.to_owned(), source })
}

/// The VMM's configuration for the VM that `args` ask for.
pub(super) fn config(args: &Args, kernel: Kernel, disk: PathBuf, net: Option<&Net>) -> VmConfig {
    let text = |path: PathBuf| path.to_string_lossy().into_owned();
    let interface = net.map(|net| NetworkInterface {
        iface_id: "eth0".to_owned(),
        host_dev_name: net.tap().to_owned(),
        guest_mac: Some(net.mac.clone()),
        mtu: None,
        rx_rate_limiter: None,
        tx_rate_limiter: None,
    });
    VmConfig {
        boot_source: Some(BootSource {
            boot_args: Some(cmdline(&kernel.cmdline, args.name.as_deref(), args.cmdline.as_deref())),
            kernel_image_path: text(kernel.kernel),
            initrd_path: kernel.initrd.map(text),
        }),
        drives: vec![Drive {
            drive_id: "disk".to_owned(),
            path_on_host: text(disk),
            // Where the command line has no root= the VMM adds the whole disk.
            is_root_device: true,
            partuuid: None,
            is_read_only: false,
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
    fn words_for_init_stay_last() {
        assert_eq!(cmdline("ro -- -v", None, Some("quiet")), "ro console=ttyS0 reboot=k panic=-1 quiet -- -v");
    }
}
