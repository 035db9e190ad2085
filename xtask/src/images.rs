//! `cargo xtask images`.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::Result;
use bedplate_guest_images::{TinyImage, VmmImage, Workshop};

use crate::build;

/// Where each image lies.
pub struct Images {
    pub vmm: VmmImage,
    pub web: PathBuf,
    pub tiny: TinyImage,
}

impl Images {
    /// Tells a test program, through its environment, where images and programs lie; `bedplate-tests` reads it.
    pub fn tell(&self, command: &mut Command) {
        command.env("BEDPLATE_PROGRAMS", build::program(""));
        command.env("BEDPLATE_VMM_KERNEL", &self.vmm.kernel).env("BEDPLATE_VMM_INITRD", &self.vmm.initrd);
        command.env("BEDPLATE_WEB_DISK", &self.web);
        command.env("BEDPLATE_TINY_KERNEL_ELF", &self.tiny.kernel_elf).env("BEDPLATE_TINY_INITRD", &self.tiny.initrd);
        command.env("BEDPLATE_TINY_DISK", &self.tiny.disk);
        command.env("BEDPLATE_LAB_LOGS", build::target().join("lab-logs"));
    }
}

/// Makes what is not there yet; the programs must have been built.
pub fn make(say: &dyn Fn(&str)) -> Result<Images> {
    let workshop = Workshop::new(&build::image_cache(), say);
    Ok(Images {
        vmm: workshop.vmm(&build::program("bedplate-node"), &build::program("bedplate-vmm"))?,
        web: workshop.web()?,
        tiny: workshop.tiny(&build::program("tiny-probe"))?,
    })
}

/// Builds the programs, makes the images, tells where they are.
pub fn run() -> Result<()> {
    build::programs()?;
    let start = Instant::now();
    let images = make(&|line| println!("{line}"))?;
    println!("vmm   {} {}", images.vmm.kernel.display(), images.vmm.initrd.display());
    println!("web   {}", images.web.display());
    println!("tiny  {} {}", images.tiny.initrd.display(), images.tiny.disk.display());
    println!("images ready in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}
