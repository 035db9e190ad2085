//! The tiny image: Debian's kernel and busybox in an initramfs. Its init brings the network up, says what it sees on the
//! serial console, and obeys commands typed there: a test is a conversation with it.

use std::fs;
use std::path::{Path, PathBuf};

use bedplate_lab::Archive;

use crate::cache::Key;
use crate::disk::{BootEntry, make_ext4, write_entry};
use crate::error::at;
use crate::packages::{PINS, section};
use crate::{Kernel, Result, Workshop};

const INIT: &str = include_str!("../files/tiny/init");
/// Its name in the directory of an image that has it.
const BUSYBOX: &str = "busybox";
const UDHCPC: &str = include_str!("../files/tiny/udhcpc");

/// Loaded by init in this order.
const MODULES: [&str; 14] = [
    "virtio_pci",
    "virtio_mmio",
    "virtio_net",
    "virtio_blk",
    "virtio-rng",
    "virtio_balloon",
    "virtio_console",
    "virtio_mem",
    "virtio_pmem",
    "nd_pmem",
    "virtiofs",
    "vmw_vsock_virtio_transport",
    "evdev",
    "button",
];

/// Files of the tiny image.
#[derive(Debug, Clone)]
pub struct TinyImage {
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// The same kernel as ELF.
    pub kernel_elf: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// Static busybox, for tests that need a tool beside the VM.
    pub busybox: PathBuf,
    /// A disk (ext4, 96 MiB) with both in `/boot`, importable as any disk image.
    pub disk: PathBuf,
}

impl Workshop<'_> {
    /// The tiny image; `probe`, a static program, becomes `/bin/probe` in it.
    pub fn tiny(&self, probe: &Path) -> Result<TinyImage> {
        let kernel = self.kernel()?;
        let pins = section(PINS, "tiny")?;
        let key = Key::default()
            .text(include_str!("tiny.rs"))
            .text(include_str!("disk.rs"))
            .text(INIT)
            .text(UDHCPC)
            .text(&format!("{pins:?}"));
        let key = key.text(&kernel.modules.to_string_lossy()).file(probe)?;
        let dir = self.cached("tiny", key, |dir| {
            self.say("tiny: packing the initramfs and the disk");
            let mut archive = self.busybox_archive(dir)?;
            archive.file("/init", 0o755, INIT).file("/etc/udhcpc", 0o755, UDHCPC).copy("/bin/probe", 0o755, probe)?;
            load_list(&mut archive, &kernel, &MODULES)?;
            let initrd = dir.join("initrd");
            fs::write(&initrd, archive.zstd(9)?).map_err(at("write", &initrd))?;
            make_disk(dir, &kernel, &initrd)
        })?;
        let [initrd, disk, busybox] = ["initrd", "disk.raw", BUSYBOX].map(|name| dir.join(name));
        Ok(TinyImage { kernel: kernel.vmlinuz, kernel_elf: kernel.vmlinux, initrd, busybox, disk })
    }

    /// An archive with static busybox as every command, and the directories that an init mounts.
    pub(crate) fn busybox_archive(&self, dir: &Path) -> Result<Archive> {
        let root = dir.join("unpacked");
        self.unpack(&section(PINS, "tiny")?, dir, &root)?;
        let mut archive = Archive::new();
        let busybox = dir.join(BUSYBOX);
        fs::rename(root.join("bin/busybox"), &busybox).map_err(at("rename", &busybox))?;
        archive.copy("/bin/busybox", 0o755, &busybox)?;
        for directory in ["/proc", "/sys", "/dev", "/run", "/tmp", "/mnt"] {
            archive.dir(directory);
        }
        archive.character_device("/dev/console", 5, 1).symlink("/bin/sh", "busybox");
        fs::remove_dir_all(&root).map_err(at("remove", &root))?;
        Ok(archive)
    }
}

/// Adds modules as files numbered in load order, so that the init of a shell script needs no `modprobe`.
pub(crate) fn load_list(archive: &mut Archive, kernel: &Kernel, names: &[&str]) -> Result<()> {
    for (number, path) in kernel.open_modules()?.closure(names)?.iter().enumerate() {
        let name = path.rsplit('/').next().unwrap_or(path);
        archive.copy(&format!("/modules/{number:02}-{name}"), 0o644, &kernel.modules.join(path))?;
    }
    Ok(())
}

/// A disk with nothing on it but what boots.
fn make_disk(dir: &Path, kernel: &Kernel, initrd: &Path) -> Result<()> {
    let root = dir.join("root");
    let boot = root.join("boot");
    fs::create_dir_all(&boot).map_err(at("create", &boot))?;
    for (from, name) in [(&kernel.vmlinuz, "vmlinuz"), (&initrd.to_owned(), "initrd.img")] {
        fs::copy(from, boot.join(name)).map_err(at("copy", from))?;
    }
    let entry = BootEntry {
        title: "tiny",
        kernel: "/boot/vmlinuz",
        initrd: "/boot/initrd.img",
        options: "console=ttyS0 quiet",
    };
    write_entry(&root, &entry)?;
    make_ext4(&root, &dir.join("disk.raw"), "tiny", "96M")?;
    fs::remove_dir_all(&root).map_err(at("remove", &root))
}
