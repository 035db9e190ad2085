//! The sample application image `web`: Debian with systemd, nginx, and a page that names its VM.
//!
//! It is a sample: its console logs root in without a password, and units that a short-lived VM has no use for are masked,
//! so that it is up quickly also where processors are emulated.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use bedplate_lab::process::output;

use crate::cache::Key;
use crate::disk::{BootEntry, make_ext4, write_entry};
use crate::error::at;
use crate::packages::{self, PINS, Pin, section};
use crate::tiny::load_list;
use crate::{Kernel, Result, Workshop};

/// Files of the image, by path: those that Debian's packages do not have.
const FILES: [(&str, &str); 10] = [
    // The root file system is mounted by the initramfs, as the kernel's command line says; there is no other.
    ("etc/fstab", ""),
    ("etc/hostname", "web\n"),
    // Empty: made at each first boot, so that no two VMs have the same.
    ("etc/machine-id", ""),
    ("etc/systemd/network/50-dhcp.network", include_str!("../files/web/dhcp.network")),
    ("etc/systemd/system/systemd-udev-trigger.service.d/coldplug.conf", include_str!("../files/web/coldplug.conf")),
    ("etc/systemd/journald.conf.d/volatile.conf", include_str!("../files/web/journald.conf")),
    ("etc/systemd/system/serial-getty@.service.d/autologin.conf", include_str!("../files/web/autologin.conf")),
    ("etc/systemd/system/guest-agent.service", include_str!("../files/web/guest-agent.service")),
    ("etc/nginx/sites-available/default", include_str!("../files/web/site.conf")),
    ("var/www/html/index.html", include_str!("../files/web/index.html")),
];

/// Name of the file with the pins, while Debian is installed.
const PREFERENCES: &str = "bedplate-pins";

const INIT: &str = include_str!("../files/web/init");

/// In the image's `/lib/modules`, and loaded by the initramfs: faster than by udev, one process for each.
const MODULES: [&str; 7] =
    ["virtio_pci", "virtio_blk", "virtio_net", "virtio-rng", "vmw_vsock_virtio_transport", "button", "evdev"];

/// In the image's `/lib/modules` only, for devices that are added later.
const LATER_MODULES: [&str; 2] = ["virtio_console", "virtio_balloon"];

/// Units that do nothing for a VM that lives for minutes to days, but cost its boot time.
const MASKED: [&str; 29] = [
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "cryptsetup.target",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
    "integritysetup.target",
    "kmod-static-nodes.service",
    "ldconfig.service",
    "modprobe@.service",
    "proc-sys-fs-binfmt_misc.automount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-journal-flush.service",
    "systemd-modules-load.service",
    "systemd-networkd-wait-online.service",
    "systemd-pcrphase.service",
    "systemd-pcrphase-sysinit.service",
    "systemd-random-seed.service",
    "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service",
];

/// Programs that systemd runs at each boot to make units of what this image does not have.
const MASKED_GENERATORS: [&str; 11] = [
    "systemd-bless-boot-generator",
    "systemd-cryptsetup-generator",
    "systemd-debug-generator",
    "systemd-gpt-auto-generator",
    "systemd-hibernate-resume-generator",
    "systemd-integritysetup-generator",
    "systemd-rc-local-generator",
    "systemd-run-generator",
    "systemd-system-update-generator",
    "systemd-sysv-generator",
    "systemd-veritysetup-generator",
];

/// What packages bring and a server does not read.
const UNREAD: [&str; 4] = ["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info"];

/// What installing packages left, and the database of hardware that no VM has.
const LEFT: [&str; 4] = ["usr/lib/udev/hwdb.d", "usr/lib/udev/hwdb.bin", "var/cache/apt", "var/log/apt"];

impl Workshop<'_> {
    /// The disk of the application image `web`: raw, ext4, with kernel and initramfs in `/boot`.
    pub fn web(&self) -> Result<PathBuf> {
        let kernel = self.kernel()?;
        let (wanted, needed) = (section(PINS, "web")?, section(PINS, "web-dependencies")?);
        let key = Key::default().text(include_str!("web.rs")).text(include_str!("disk.rs")).text(INIT);
        let key = key.text(&format!("{FILES:?}{wanted:?}{needed:?}")).text(&kernel.modules.to_string_lossy());
        let dir = self.cached("web", key, |dir| {
            let root = dir.join("root");
            self.say("web: installing Debian (half a minute)");
            self.debian(dir, &root, &wanted, &needed)?;
            configure(&root)?;
            self.say("web: adding the kernel and making the disk");
            self.make_bootable(dir, &root, &kernel)?;
            make_ext4(&root, &dir.join("disk.raw"), "web", "1G")?;
            fs::remove_dir_all(&root).map_err(at("remove", &root))
        })?;
        Ok(dir.join("disk.raw"))
    }

    /// Installs `wanted` and what every Debian has into `root`, in the pinned versions where the archive has them.
    fn debian(&self, dir: &Path, root: &Path, wanted: &[Pin<'_>], needed: &[Pin<'_>]) -> Result<()> {
        let preferences = dir.join(PREFERENCES);
        let pins: Vec<Pin<'_>> = wanted.iter().chain(needed).copied().collect();
        fs::write(&preferences, packages::preferences(&pins)).map_err(at("write", &preferences))?;
        // With mounts and processes of its own, which end with it. Should it be killed, nothing stays mounted in `root`, where
        // somebody would remove it as files.
        let mut mmdebstrap = Command::new("unshare");
        mmdebstrap.args(["--mount", "--pid", "--mount-proc", "--kill-child", "mmdebstrap"]);
        mmdebstrap.args(["--mode=root", "--variant=minbase"]);
        // With the directories merged from the start no package is needed that merges them, nor the Perl it is written in.
        mmdebstrap.arg("--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr");
        mmdebstrap.arg(format!("--setup-hook=copy-in {} /etc/apt/preferences.d", preferences.display()));
        mmdebstrap.args(["--aptopt=Acquire::Languages \"none\"", "--dpkgopt=force-unsafe-io"]);
        for unread in UNREAD {
            mmdebstrap.arg(format!("--dpkgopt=path-exclude=/{unread}/*"));
        }
        let names: Vec<&str> = wanted.iter().map(|pin| pin.name).collect();
        mmdebstrap.arg(format!("--include={}", names.join(",")));
        output(mmdebstrap.arg("bookworm").arg(root))?;
        for left in [preferences, root.join("etc/apt/preferences.d").join(PREFERENCES)] {
            fs::remove_file(&left).map_err(at("remove", &left))?;
        }
        let mut query = Command::new("dpkg-query");
        query.arg(format!("--admindir={}", root.join("var/lib/dpkg").display()));
        let installed = output(query.args(["-W", "-f=${Package} ${Version}\n"]))?;
        for (name, version) in installed.lines().filter_map(|line| line.split_once(' ')) {
            if let Some(pin) = pins.iter().find(|pin| pin.name == name) {
                self.note(pin, version);
            }
        }
        Ok(())
    }

    /// Kernel, modules and a small initramfs, under the names that Debian gives them.
    fn make_bootable(&self, dir: &Path, root: &Path, kernel: &Kernel) -> Result<()> {
        let version = kernel.version();
        let boot = root.join("boot");
        copy(&kernel.vmlinuz, &boot.join(format!("vmlinuz-{version}")))?;
        let mut archive = self.busybox_archive(dir)?;
        archive.file("/init", 0o755, INIT);
        load_list(&mut archive, kernel, &MODULES)?;
        write(&boot.join(format!("initrd.img-{version}")), archive.zstd(9)?)?;
        write_entry(
            root,
            &BootEntry {
                title: "Debian",
                kernel: &format!("/boot/vmlinuz-{version}"),
                initrd: &format!("/boot/initrd.img-{version}"),
                options: "root=LABEL=web rw quiet systemd.show_status=error",
            },
        )?;
        let tree = root.join("lib/modules").join(&version);
        for path in kernel.open_modules()?.closure(&[&MODULES[..], &LATER_MODULES].concat())? {
            copy(&kernel.modules.join(&path), &tree.join(&path))?;
        }
        for list in ["modules.builtin", "modules.builtin.modinfo", "modules.order"] {
            copy(&kernel.modules.join(list), &tree.join(list))?;
        }
        output(Command::new("depmod").arg("-b").arg(root).arg(&version))?;
        Ok(())
    }
}

fn configure(root: &Path) -> Result<()> {
    for left in UNREAD.iter().chain(&LEFT).map(|path| root.join(path)) {
        let removed = if left.is_dir() { fs::remove_dir_all(&left) } else { fs::remove_file(&left) };
        match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(at("remove", &left)(error)),
            _ => {}
        }
    }
    for (path, content) in FILES {
        write(&root.join(path), content)?;
    }
    let units = root.join("etc/systemd/system");
    for unit in MASKED {
        link("/dev/null", &units.join(unit))?;
    }
    for generator in MASKED_GENERATORS {
        link("/dev/null", &root.join("etc/systemd/system-generators").join(generator))?;
    }
    let networkd = "/lib/systemd/system/systemd-networkd.service";
    link(networkd, &units.join("multi-user.target.wants/systemd-networkd.service"))?;
    // Not the package's own, which waits for a device that QEMU has.
    link("../guest-agent.service", &units.join("multi-user.target.wants/guest-agent.service"))?;
    // Tells systemd that /etc and /var are as this version of /usr wants them, so that nothing is rebuilt at boot.
    for stamp in ["etc/.updated", "var/.updated"] {
        write(&root.join(stamp), "")?;
    }
    Ok(())
}

fn write(path: &Path, content: impl AsRef<[u8]>) -> Result<()> {
    make_parent(path)?;
    fs::write(path, content).map_err(at("write", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).map_err(at("change", path))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    make_parent(to)?;
    fs::copy(from, to).map_err(at("copy", from)).map(drop)
}

/// Replaces what is at `path`.
fn link(target: &str, path: &Path) -> Result<()> {
    make_parent(path)?;
    let _ = fs::remove_file(path);
    symlink(target, path).map_err(at("link", path))
}

fn make_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), |parent| fs::create_dir_all(parent).map_err(at("create", parent)))
}
