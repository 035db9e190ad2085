//! Recipes for what machines and VMs boot, made of Debian packages by name. No binary is ever committed.
//!
//! - [`Workshop::kernel`]: Debian's cloud kernel as shipped, its modules, and the ELF file inside it;
//! - [`Workshop::vmm`]: the VMM image: that kernel and an initramfs with nothing but `bedplate-node` as init,
//!   `bedplate-vmm` and the modules they need;
//! - [`Workshop::web`]: a Debian system with systemd and a web server, whose page names its VM;
//! - [`Workshop::tiny`]: a kernel and busybox, for tests: up in about a second;
//! - [`Workshop::grub`]: the same behind a boot loader, and firmware to start that.
//!
//! Everything made is kept in a cache directory under a name with a key of all that went in; what is there is used as it
//! is. `packages.txt` pins the versions.

mod cache;
mod disk;
pub mod error;
mod grub;
mod kernel;
mod packages;
mod tiny;
mod vmm;
mod web;

use std::path::{Path, PathBuf};

pub use error::{Error, Result};
pub use grub::GrubImage;
pub use kernel::Kernel;
pub use tiny::TinyImage;
pub use vmm::VmmImage;

/// Debian packages whose programs the recipes run.
pub const TOOLS: [&str; 7] = ["mmdebstrap", "e2fsprogs", "kmod", "zstd", "lz4", "binutils", "qemu-utils"];

/// Where images are made and kept.
pub struct Workshop<'a> {
    cache: PathBuf,
    say: &'a dyn Fn(&str),
}

impl<'a> Workshop<'a> {
    /// Keeps everything under `cache`; tells through `say` what it does, one line at a time.
    pub fn new(cache: &Path, say: &'a dyn Fn(&str)) -> Self {
        Self { cache: cache.to_owned(), say }
    }

    fn say(&self, line: impl AsRef<str>) {
        (self.say)(line.as_ref());
    }
}
