//! Checks of a manifest beyond what its JSON types say.

use bedplate_api::Digest;
use bedplate_api::image::{ImageKind, ImageSummary, Manifest, Part};

use crate::index::MAX_PART_SIZE;

/// The version that this program writes and reads.
pub const SCHEMA: u32 = 1;

/// No manifest is longer, in bytes: it is read into memory before it is checked.
pub const MAX_MANIFEST_LEN: u64 = 1 << 20;

/// The part of a disk image that the guest sees.
pub const DISK: &str = "disk";
/// The part with a kernel.
pub const KERNEL: &str = "kernel";
/// The part with an initial RAM disk.
pub const INITRD: &str = "initrd";

/// The part with a suspended guest's memory.
pub const MEMORY: &str = "memory";
/// The part with the state of a suspended guest's machine.
pub const STATE: &str = "state";

/// Parts that one image may have; three are used today.
const MAX_PARTS: usize = 64;

/// The kernel takes no more on x86-64 (COMMAND_LINE_SIZE).
pub const MAX_CMDLINE_LEN: usize = 2048;

/// A manifest that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not the JSON that it should be.
    #[error("this is not an image manifest ({0})")]
    Syntax(serde_json::Error),
    /// Longer than any manifest.
    #[error("an image manifest of {0} bytes is more than the {MAX_MANIFEST_LEN} that are allowed")]
    TooLong(u64),
    /// From a later version.
    #[error("this image has manifest schema {0} and this program knows {SCHEMA}: update Bedplate")]
    Schema(u32),
    /// Too many parts, or none.
    #[error("this image has {0} parts; 1 to {MAX_PARTS} are allowed")]
    PartCount(usize),
    /// A name that cannot be a file name everywhere.
    #[error("the part name {0:?} is not made of 1 to 32 characters a-z, 0-9 and -")]
    PartName(String),
    /// Larger than any part may be.
    #[error("part {part:?} claims {size} bytes; the most is {MAX_PART_SIZE}")]
    PartSize {
        /// Its name.
        part: String,
        /// Its claim.
        size: u64,
    },
    /// More content than address space.
    #[error("part {part:?} claims more content than its size")]
    PartContent {
        /// Its name.
        part: String,
    },
    /// A disk image without a disk.
    #[error("this image is of kind \"disk\" and has no part \"disk\"")]
    NoDisk,
    /// A suspended guest without what it consists of.
    #[error("this image is of kind \"suspended\" and has not both parts \"memory\" and \"state\"")]
    NotSuspended,
    /// A guest that goes on does not boot.
    #[error("this image is of kind \"suspended\" and says how to boot it")]
    BootOfSuspended,
    /// The boot data names a part that is not there.
    #[error("the boot data names the part {0:?}, which this image does not have")]
    BootPart(String),
    /// Two ways to start it.
    #[error("this image has both boot data and a mark that it is started by firmware")]
    TwoBoots,
    /// The command line is too long, or has control characters in it.
    #[error("the kernel command line is longer than {MAX_CMDLINE_LEN} bytes or has control characters")]
    Cmdline,
    /// Asked for a part that is not there.
    #[error("this image has no part {0:?}")]
    NoPart(String),
}

/// Reads and checks the manifest in `bytes`.
pub fn parse(bytes: &[u8]) -> Result<Manifest, ManifestError> {
    if bytes.len() as u64 > MAX_MANIFEST_LEN {
        return Err(ManifestError::TooLong(bytes.len() as u64));
    }
    let manifest: Manifest = serde_json::from_slice(bytes).map_err(ManifestError::Syntax)?;
    validate(&manifest)?;
    Ok(manifest)
}

/// The bytes whose digest is the image's name: compact JSON, fields in the order of the type, maps sorted by key.
pub fn encode(manifest: &Manifest) -> Result<Vec<u8>, ManifestError> {
    validate(manifest)?;
    let bytes = serde_json::to_vec(manifest).map_err(ManifestError::Syntax)?;
    if bytes.len() as u64 > MAX_MANIFEST_LEN {
        return Err(ManifestError::TooLong(bytes.len() as u64));
    }
    Ok(bytes)
}

/// Checks everything that can be checked without the store.
pub fn validate(manifest: &Manifest) -> Result<(), ManifestError> {
    if manifest.schema != SCHEMA {
        return Err(ManifestError::Schema(manifest.schema));
    }
    if manifest.parts.is_empty() || manifest.parts.len() > MAX_PARTS {
        return Err(ManifestError::PartCount(manifest.parts.len()));
    }
    for (name, part) in &manifest.parts {
        validate_part(name, part)?;
    }
    let has = |name: &str| manifest.parts.contains_key(name);
    match manifest.kind {
        ImageKind::Disk if !has(DISK) => return Err(ManifestError::NoDisk),
        ImageKind::Suspended if !has(MEMORY) || !has(STATE) => return Err(ManifestError::NotSuspended),
        ImageKind::Suspended if manifest.boot.is_some() || manifest.firmware.is_some() => {
            return Err(ManifestError::BootOfSuspended);
        }
        ImageKind::Disk | ImageKind::Vmm | ImageKind::Suspended => {}
    }
    let Some(boot) = &manifest.boot else { return Ok(()) };
    if manifest.firmware.is_some() {
        return Err(ManifestError::TwoBoots);
    }
    for name in std::iter::once(&boot.kernel).chain(&boot.initrd) {
        if !manifest.parts.contains_key(name) {
            return Err(ManifestError::BootPart(name.clone()));
        }
    }
    if boot.cmdline.len() > MAX_CMDLINE_LEN || boot.cmdline.chars().any(char::is_control) {
        return Err(ManifestError::Cmdline);
    }
    Ok(())
}

fn validate_part(name: &str, part: &Part) -> Result<(), ManifestError> {
    let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
    if name.is_empty() || name.len() > 32 || !name.bytes().all(plain) {
        return Err(ManifestError::PartName(name.chars().take(40).collect()));
    }
    if part.size > MAX_PART_SIZE {
        return Err(ManifestError::PartSize { part: name.to_owned(), size: part.size });
    }
    if part.content > part.size {
        return Err(ManifestError::PartContent { part: name.to_owned() });
    }
    Ok(())
}

/// The part called `name`.
pub fn part<'a>(manifest: &'a Manifest, name: &str) -> Result<&'a Part, ManifestError> {
    manifest.parts.get(name).ok_or_else(|| ManifestError::NoPart(name.to_owned()))
}

/// What lists show of the image that `name` points to.
pub fn summary(name: &str, digest: Digest, manifest: &Manifest) -> ImageSummary {
    let sum = |of: fn(&Part) -> u64| manifest.parts.values().map(of).fold(0, u64::saturating_add);
    let disk = manifest.parts.get(DISK).filter(|_| manifest.kind == ImageKind::Disk);
    let size = disk.map_or_else(|| sum(|part| part.size), |disk| disk.size);
    ImageSummary {
        name: name.to_owned(),
        digest,
        kind: manifest.kind,
        size,
        content: sum(|part| part.content),
        direct_boot: manifest.boot.is_some(),
        firmware: manifest.firmware,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use bedplate_api::image::{BootData, Origin, TraceKind};

    use super::*;

    fn sample() -> Manifest {
        let part = |size| Part { size, index: Digest::from_bytes([1; 32]), content: 1 };
        Manifest {
            schema: SCHEMA,
            kind: ImageKind::Disk,
            parts: [DISK, KERNEL].map(|name| (name.to_owned(), part(10))).into(),
            boot: Some(BootData { kernel: KERNEL.to_owned(), initrd: None, cmdline: "root=/dev/vda ro".to_owned() }),
            firmware: None,
            origin: None,
            labels: BTreeMap::from([("source".to_owned(), "a.raw".to_owned())]),
        }
    }

    /// What schema 1 looks like. If this fails, digests of images changed: see "How to change it" in
    /// `docs/image-format.md`.
    #[test]
    fn golden() {
        let golden = include_bytes!("../golden/manifest-v1.json");
        assert_eq!(String::from_utf8_lossy(&encode(&sample()).unwrap()), String::from_utf8_lossy(golden));
        assert_eq!(parse(golden).unwrap(), sample());
    }

    /// A disk that only firmware can start.
    #[test]
    fn golden_firmware() {
        let golden = include_bytes!("../golden/manifest-v1-firmware.json");
        let manifest = Manifest { boot: None, firmware: Some(bedplate_api::image::Firmware::Either), ..sample() };
        assert_eq!(String::from_utf8_lossy(&encode(&manifest).unwrap()), String::from_utf8_lossy(golden));
        assert_eq!(parse(golden).unwrap(), manifest);
    }

    /// A disk that was captured from a VM.
    #[test]
    fn golden_captured() {
        let golden = include_bytes!("../golden/manifest-v1-captured.json");
        let origin = Origin {
            parent: Digest::from_bytes([2; 32]),
            captured_from: "web-1".to_owned(),
            at_rest: true,
            unique: Some([TraceKind::HostKey, TraceKind::MachineId].into()),
        };
        let manifest = Manifest { origin: Some(origin), ..sample() };
        assert_eq!(String::from_utf8_lossy(&encode(&manifest).unwrap()), String::from_utf8_lossy(golden));
        assert_eq!(parse(golden).unwrap(), manifest);
    }

    /// A guest that stands still.
    #[test]
    fn golden_suspended() {
        let golden = include_bytes!("../golden/manifest-v1-suspended.json");
        let part = |size| Part { size, index: Digest::from_bytes([1; 32]), content: 1 };
        let parts = [DISK, MEMORY, STATE].map(|name| (name.to_owned(), part(10))).into();
        let manifest = Manifest { kind: ImageKind::Suspended, parts, boot: None, ..sample() };
        assert_eq!(String::from_utf8_lossy(&encode(&manifest).unwrap()), String::from_utf8_lossy(golden));
        assert_eq!(parse(golden).unwrap(), manifest);
        let lacks = |name: &str| {
            let mut manifest = manifest.clone();
            manifest.parts.remove(name);
            encode(&manifest).map_err(|error| error.to_string()).err().unwrap_or_default()
        };
        assert_eq!(lacks(DISK), "");
        assert!(lacks(MEMORY).contains("\"memory\"") && lacks(STATE).contains("\"state\""));
        let boots = Manifest { firmware: Some(bedplate_api::image::Firmware::Bios), ..manifest };
        assert!(encode(&boots).unwrap_err().to_string().contains("says how to boot"));
    }

    #[test]
    fn each_rule_refuses() {
        let refused = |change: fn(&mut Manifest), message: &str| {
            let mut manifest = sample();
            change(&mut manifest);
            let error = encode(&manifest).unwrap_err().to_string();
            assert!(error.contains(message), "{error:?} should mention {message:?}");
        };
        refused(|m| m.schema = 2, "schema 2");
        refused(|m| m.parts.clear(), "0 parts");
        refused(|m| m.parts.extend([("../x".to_owned(), m.parts[DISK].clone())]), "../x");
        refused(|m| m.parts.get_mut(DISK).unwrap().size = MAX_PART_SIZE + 1, "claims");
        refused(|m| m.parts.get_mut(DISK).unwrap().content = 11, "more content");
        refused(|m| m.parts.retain(|name, _| name != DISK), "no part \"disk\"");
        refused(|m| m.parts.retain(|name, _| name != KERNEL), "names the part \"kernel\"");
        refused(|m| m.firmware = Some(bedplate_api::image::Firmware::Bios), "both");
        refused(|m| m.boot.as_mut().unwrap().cmdline = "a\nb".to_owned(), "control characters");
        refused(|m| m.boot.as_mut().unwrap().cmdline = "a".repeat(MAX_CMDLINE_LEN + 1), "longer");
    }

    #[test]
    fn unknown_fields_and_noise_are_refused() {
        let text = String::from_utf8(encode(&sample()).unwrap()).unwrap();
        assert!(parse(text.replacen('{', "{\"extra\":1,", 1).as_bytes()).is_err());
        assert!(matches!(parse(&vec![b' '; MAX_MANIFEST_LEN as usize + 1]), Err(ManifestError::TooLong(_))));
        for cut in 0..text.len() {
            assert!(parse(&text.as_bytes()[..cut]).is_err());
        }
    }
}
