//! `cargo xtask images`.

use std::path::PathBuf;
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
