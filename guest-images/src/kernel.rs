//! Debian's cloud kernel: as shipped, its modules, and the uncompressed ELF file inside it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bedplate_lab::Modules;
use bedplate_lab::process::output;

use crate::cache::Key;
use crate::error::at;
use crate::packages::{PINS, section};
use crate::{Error, Result, Workshop};

/// Files of one kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The bzImage, as the package has it.
    pub vmlinuz: PathBuf,
    /// The ELF file that was compressed in it.
    pub vmlinux: PathBuf,
    /// `/lib/modules/{version}`, with `modules.dep`.
    pub modules: PathBuf,
}

impl Kernel {
    /// As `uname -r` prints it.
    pub fn version(&self) -> String {
        self.modules.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    pub(crate) fn open_modules(&self) -> Result<Modules> {
        Ok(Modules::open(&self.modules)?)
    }

    fn find(dir: &Path) -> Result<Self> {
        let trees = dir.join("root/lib/modules");
        let mut entries = fs::read_dir(&trees).map_err(at("list", &trees))?.flatten();
        let modules = entries.next().map(|entry| entry.path()).unwrap_or_default();
        Ok(Self { vmlinuz: dir.join("vmlinuz"), vmlinux: dir.join("vmlinux"), modules })
    }
}

impl Workshop<'_> {
    /// The kernel of the package `linux-image-cloud-amd64`.
    pub fn kernel(&self) -> Result<Kernel> {
        let pins = section(PINS, "kernel")?;
        let key = Key::default().text(include_str!("kernel.rs")).text(&format!("{pins:?}"));
        let dir = self.cached("kernel", key, |dir| {
            self.say("kernel: unpacking Debian's package");
            self.unpack(&pins, dir, &dir.join("root"))?;
            let boot = dir.join("root/boot");
            let mut files = fs::read_dir(&boot).map_err(at("list", &boot))?.flatten().map(|entry| entry.path());
            let is_kernel = |path: &PathBuf| path.to_string_lossy().contains("/vmlinuz-");
            let shipped = files.find(is_kernel).ok_or_else(|| Error::NoPackage { package: "kernel".into() })?;
            let vmlinuz = dir.join("vmlinuz");
            fs::rename(&shipped, &vmlinuz).map_err(at("rename", &shipped))?;
            extract_elf(&vmlinuz, &dir.join("vmlinux"))?;
            let kernel = Kernel::find(dir)?;
            output(Command::new("depmod").arg("-b").arg(dir.join("root")).arg(kernel.version()))?;
            Ok(())
        })?;
        Kernel::find(&dir)
    }
}

/// Unpacks the payload of a bzImage; fields as in the kernel's Documentation/x86/boot.rst.
fn extract_elf(vmlinuz: &Path, vmlinux: &Path) -> Result<()> {
    let image = fs::read(vmlinuz).map_err(at("read", vmlinuz))?;
    let payload = payload(&image).map_err(|problem| Error::NotBzImage { path: vmlinuz.to_owned(), problem })?;
    let compressed = vmlinux.with_extension("lz4");
    fs::write(&compressed, payload).map_err(at("write", &compressed))?;
    output(Command::new("lz4").args(["-q", "-d", "-f"]).arg(&compressed).arg(vmlinux))?;
    fs::remove_file(&compressed).map_err(at("remove", &compressed))
}

/// The LZ4 frame in a bzImage.
fn payload(image: &[u8]) -> std::result::Result<&[u8], &'static str> {
    const SETUP_SECTORS: usize = 0x1f1;
    const MAGIC: usize = 0x202;
    const PAYLOAD_OFFSET: usize = 0x248;
    const PAYLOAD_LENGTH: usize = 0x24c;
    /// The legacy LZ4 frame, which is what the kernel's build makes.
    const LZ4_LEGACY: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
    let word = |at: usize| -> Option<usize> {
        let bytes: [u8; 4] = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    if image.get(MAGIC..MAGIC + 4) != Some(b"HdrS") {
        return Err("no boot protocol header");
    }
    let sectors = usize::from(*image.get(SETUP_SECTORS).ok_or("too short")?);
    let offset = word(PAYLOAD_OFFSET).ok_or("too short")?;
    let length = word(PAYLOAD_LENGTH).ok_or("too short")?;
    let start = ((sectors + 1) * 512).checked_add(offset).ok_or("the payload lies outside")?;
    // The build appends the uncompressed size, which is not part of the frame.
    let end = start.checked_add(length).and_then(|end| end.checked_sub(4)).ok_or("the payload lies outside")?;
    let payload = image.get(start..end).ok_or("the payload lies outside")?;
    if payload.starts_with(&LZ4_LEGACY) { Ok(payload) } else { Err("the payload is not LZ4") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Vec<u8> {
        let mut image = vec![0; 2048];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&12u32.to_le_bytes());
        image[1040..1044].copy_from_slice(&0x184c_2102_u32.to_le_bytes());
        image
    }

    #[test]
    fn the_payload_is_found_without_its_size() {
        assert_eq!(payload(&image()).unwrap().len(), 8);
    }

    #[test]
    fn other_files_are_refused() {
        assert!(payload(b"MZ").is_err());
        let mut outside = image();
        outside[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(payload(&outside), Err("the payload lies outside"));
        let mut gzip = image();
        gzip[1040] = 0x1f;
        assert_eq!(payload(&gzip), Err("the payload is not LZ4"));
    }
}
