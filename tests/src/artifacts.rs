//! Where the programs and images under test lie.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Prefix of the environment variables that name them.
const PREFIX: &str = "BEDPLATE_TEST_";

/// Programs and images, built before any test starts.
#[derive(Debug, Clone)]
pub struct Artifacts {
    /// Directory with `bedplate`, `bedplate-control`, `bedplate-node`, `bedplate-vmm`, ….
    pub programs: PathBuf,
    /// Kernel of the VMM image, a bzImage.
    pub vmm_kernel: PathBuf,
    /// Initramfs of the VMM image.
    pub vmm_initrd: PathBuf,
    /// `/lib/modules/{version}` of that kernel.
    pub modules: PathBuf,
    /// Disk of the sample image `web`.
    pub web_disk: PathBuf,
    /// The kernel of the tiny image as ELF.
    pub tiny_kernel_elf: PathBuf,
    /// Initramfs of the tiny image.
    pub tiny_initrd: PathBuf,
    /// Static busybox.
    pub busybox: PathBuf,
    /// Disk of the tiny image.
    pub tiny_disk: PathBuf,
    /// Disk of the tiny image with GRUB on it.
    pub grub_disk: PathBuf,
    /// A BIOS that starts it.
    pub firmware: PathBuf,
    /// Where serial logs go; they stay where a test failed.
    pub logs: PathBuf,
}

impl Artifacts {
    /// As [`Self::tell`] told this process; `None` when it was started by hand.
    pub fn from_env() -> Option<Self> {
        let path = |name: &str| std::env::var_os(format!("{PREFIX}{name}")).map(PathBuf::from);
        Some(Self {
            programs: path("PROGRAMS")?,
            vmm_kernel: path("VMM_KERNEL")?,
            vmm_initrd: path("VMM_INITRD")?,
            modules: path("MODULES")?,
            web_disk: path("WEB_DISK")?,
            tiny_kernel_elf: path("TINY_KERNEL_ELF")?,
            tiny_initrd: path("TINY_INITRD")?,
            busybox: path("BUSYBOX")?,
            tiny_disk: path("TINY_DISK")?,
            grub_disk: path("GRUB_DISK")?,
            firmware: path("FIRMWARE")?,
            logs: path("LOGS")?,
        })
    }

    /// For a test: the artifacts, or `None` after saying why the test is skipped.
    pub fn or_skip(test: &str) -> Option<Self> {
        let artifacts = Self::from_env();
        if artifacts.is_none() {
            println!("skipped: {test}: needs programs and images; run it through `cargo xtask test`");
        }
        artifacts
    }

    /// Makes them known to `command`.
    pub fn tell(&self, command: &mut Command) {
        let mut set = |name: &str, path: &Path| {
            command.env(format!("{PREFIX}{name}"), path);
        };
        set("PROGRAMS", &self.programs);
        set("VMM_KERNEL", &self.vmm_kernel);
        set("VMM_INITRD", &self.vmm_initrd);
        set("MODULES", &self.modules);
        set("WEB_DISK", &self.web_disk);
        set("TINY_KERNEL_ELF", &self.tiny_kernel_elf);
        set("TINY_INITRD", &self.tiny_initrd);
        set("BUSYBOX", &self.busybox);
        set("TINY_DISK", &self.tiny_disk);
        set("GRUB_DISK", &self.grub_disk);
        set("FIRMWARE", &self.firmware);
        set("LOGS", &self.logs);
    }

    /// One of the programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }
}
