//! The VMM image: what a blank machine boots into a hypervisor node. A kernel, its modules, one init, one VMM: no shell, no
//! package manager, no library.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bedplate_lab::Archive;
use bedplate_lab::process::output;

use crate::cache::Key;
use crate::error::at;
use crate::{Result, Workshop};

/// Loaded by init in this order, with what they need; one that the machine has no use for (the other maker's KVM) may fail.
const MODULES: [&str; 17] = [
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "virtio-rng",
    "kvm-amd",
    "kvm-intel",
    "tun",
    "bridge",
    "button",
    "evdev",
    "vsock",
    "vhost_net",
    "vhost_vsock",
    "vmw_vsock_virtio_transport",
    "virtio_console",
    "loop",
    "ena",
];

/// A faster level costs a slower network boot, which everybody waits for; this one takes two seconds.
const COMPRESSION: u8 = 12;

/// Files of the VMM image.
#[derive(Debug, Clone)]
pub struct VmmImage {
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

impl Workshop<'_> {
    /// The VMM image with `node` (`bedplate-node`) as init and `vmm` (`bedplate-vmm`) beside it, both static programs.
    pub fn vmm(&self, node: &Path, vmm: &Path) -> Result<VmmImage> {
        let kernel = self.kernel()?;
        let key = Key::default().text(include_str!("vmm.rs")).text(&kernel.modules.to_string_lossy());
        let key = key.file(node)?.file(vmm)?;
        let dir = self.cached("vmm", key, |dir| {
            self.say("vmm: packing the initramfs");
            let mut archive = Archive::new();
            archive.copy("/init", 0o755, &stripped(node, dir)?)?;
            archive.copy("/bin/bedplate-vmm", 0o755, &stripped(vmm, dir)?)?;
            archive.file("/etc/bedplate/modules", 0o644, MODULES.join("\n") + "\n");
            for mount_point in ["/proc", "/sys", "/dev", "/run", "/tmp", "/var"] {
                archive.dir(mount_point);
            }
            archive.character_device("/dev/console", 5, 1);
            kernel.open_modules()?.add_to(&mut archive, &MODULES)?;
            let initrd = dir.join("initrd");
            fs::write(&initrd, archive.zstd(COMPRESSION)?).map_err(at("write", &initrd))
        })?;
        Ok(VmmImage { kernel: kernel.vmlinuz, initrd: dir.join("initrd") })
    }
}

/// A copy of `program` in `dir` without its symbols, which are three quarters of it.
fn stripped(program: &Path, dir: &Path) -> Result<PathBuf> {
    let copy = dir.join(program.file_name().unwrap_or_default());
    output(Command::new("strip").arg("-o").arg(&copy).arg(program))?;
    Ok(copy)
}
