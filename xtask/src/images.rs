//! `cargo xtask images`.

use std::time::Instant;

use anyhow::Result;
use bedplate_guest_images::Workshop;
use bedplate_tests::Artifacts;

use crate::build;

/// Makes what is not there yet; the programs must have been built.
pub fn make(say: &dyn Fn(&str)) -> Result<Artifacts> {
    let workshop = Workshop::new(&build::image_cache(), say);
    let vmm = workshop.vmm(&build::program("bedplate-node"), &build::program("bedplate-vmm"))?;
    let tiny = workshop.tiny(&build::program("tiny-probe"))?;
    let grub = workshop.grub(&tiny)?;
    Ok(Artifacts {
        programs: build::program(""),
        modules: workshop.kernel()?.modules,
        vmm_kernel: vmm.kernel,
        vmm_initrd: vmm.initrd,
        web_disk: workshop.web()?,
        tiny_kernel_elf: tiny.kernel_elf,
        tiny_initrd: tiny.initrd,
        busybox: tiny.busybox,
        tiny_disk: tiny.disk,
        grub_disk: grub.disk,
        firmware: grub.firmware,
        logs: build::target().join("lab-logs"),
    })
}

/// Builds the programs, makes the images, tells where they are.
pub fn run() -> Result<()> {
    build::programs()?;
    let start = Instant::now();
    let images = make(&|line| println!("{line}"))?;
    let (kernel, initrd) = (images.vmm_kernel.display(), images.vmm_initrd.display());
    println!("vmm   {kernel} {initrd}");
    println!("web   {}", images.web_disk.display());
    println!("tiny  {} {}", images.tiny_initrd.display(), images.tiny_disk.display());
    println!("grub  {} {}", images.grub_disk.display(), images.firmware.display());
    println!("`bedplate run --lab` and control nodes take the VMM image from an image store; this puts it into yours:");
    println!(
        "  {} image import-vmm --kernel {kernel} --initrd {initrd} --name vmm",
        build::program("bedplate").display()
    );
    println!("images ready in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}
