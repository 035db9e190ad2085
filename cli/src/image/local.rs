//! What needs the local store only.

use std::path::PathBuf;
use std::time::Duration;

use bedplate_api::Digest;
use bedplate_api::image::{Firmware, ImageKind, ImageSummary, Swept};
use bedplate_images::{Store, StoreError, export};
use comfy_table::Cell;
use serde::Serialize;
use serde_json::json;

use super::{Error, FileFormat, note_moved, print_one};
use crate::output::{self, Format, PrintError, note};
use crate::progress::Progress;
use crate::rundir;

pub(super) fn ls(dir: PathBuf, format: Format) -> Result<(), Error> {
    let empty = "No image yet; `bedplate image import FILE --name NAME` makes one.";
    let store = match Store::open(dir) {
        Ok(store) => store,
        // Nothing was ever imported; nothing is wrong.
        Err(StoreError::NotAStore { dir }) if !dir.exists() => return Ok(print(&[], format, empty)?),
        Err(e) => return Err(e.into()),
    };
    let (mut images, mut bad) = (Vec::new(), 0);
    // One that is damaged must not hide the others.
    for (name, digest) in store.each_tag()? {
        match digest.and_then(|_| store.summary(&name)) {
            Ok(image) => images.push(image),
            Err(error) => {
                bad += 1;
                note(&format!("{name}: {}", with_removal(&error, &name, &store)));
            }
        }
    }
    if bad == 0 || !images.is_empty() || format == Format::Json {
        print(&images, format, empty)?;
    }
    if bad > 0 { Err(Error::Unreadable { count: bad, dir: store.dir().to_owned() }) } else { Ok(()) }
}

/// What `error` says, and how to be rid of the name.
fn with_removal(error: &StoreError, name: &str, store: &Store) -> String {
    match error {
        StoreError::TagCorrupt { .. } => error.to_string(),
        _ => format!("{error}; `bedplate image rm {name} --store {}` removes the name", store.dir().display()),
    }
}

pub(super) fn print(images: &[ImageSummary], format: Format, empty: &str) -> Result<(), PrintError> {
    output::list(format, images, empty, &["NAME", "DIGEST", "KIND", "SIZE", "CONTENT", "BOOT"], |image| {
        let boot = match (image.kind, image.direct_boot, image.firmware) {
            (_, true, _) => "direct",
            (_, _, Some(Firmware::Bios)) => "firmware (BIOS)",
            (_, _, Some(Firmware::Uefi)) => "firmware (UEFI)",
            (_, _, Some(Firmware::Either)) => "firmware (BIOS, UEFI)",
            (ImageKind::Disk, false, None) => "no kernel found",
            (ImageKind::Vmm | ImageKind::Suspended, false, None) => "-",
        };
        vec![
            Cell::new(&image.name),
            Cell::new(image.digest.short()),
            Cell::new(output::word(&image.kind)),
            Cell::new(output::bytes(image.size)),
            Cell::new(output::bytes(image.content)),
            Cell::new(boot),
        ]
    })
}

pub(super) fn tag(store: &Store, name: &str, new: &str, format: Format) -> Result<(), Error> {
    // What is found stays until it has the name.
    let lease = store.lease()?;
    let digest = store.resolve(name)?;
    let before = store.tag(new).ok();
    store.set_tag(new, &digest)?;
    drop(lease);
    note_moved(new, before, &digest);
    Ok(print_one(&store.summary(new)?, format)?)
}

pub(super) fn inspect(store: &Store, name: &str, format: Format) -> Result<(), Error> {
    let digest = store.resolve(name)?;
    let manifest = store.manifest(&digest)?;
    let missing = store.missing_of(&digest)?;
    if format == Format::Json {
        let whole = json!({
            "digest": digest, "manifest": manifest,
            "chunks": missing.total, "chunks_missing": missing.chunks,
        });
        return Ok(output::json(&whole)?);
    }
    let mut text = format!("digest    {digest}\nkind      {}", output::word(&manifest.kind));
    for (name, part) in &manifest.parts {
        let (size, content) = (output::bytes(part.size), output::bytes(part.content));
        text += &format!("\npart      {name}: {size}, {content} of content");
    }
    if let Some(origin) = &manifest.origin {
        let rest = if origin.at_rest { "at rest" } else { "as after a power cut" };
        let from = origin.captured_from.chars().filter(|c| !c.is_control()).collect::<String>();
        text += &format!("\norigin    captured from {from}, a child of {}, file systems {rest}", origin.parent.short());
        text += &match &origin.unique {
            None => "\nunique    nobody could look for what belongs to that machine alone".to_owned(),
            Some(kinds) if kinds.is_empty() => "\nunique    nothing that is known of".to_owned(),
            Some(kinds) => {
                let kinds: Vec<String> = kinds.iter().map(output::word).collect();
                format!("\nunique    {}: it belongs to that machine alone", kinds.join(", "))
            }
        };
    }
    match &manifest.boot {
        Some(boot) => {
            let initrd = boot.initrd.as_ref().map(|part| format!(" with part {part}")).unwrap_or_default();
            text += &format!("\nboot      part {}{initrd}\ncmdline   {}", boot.kernel, boot.cmdline);
        }
        None => {
            text += "\nboot      no kernel was found inside; `bedplate run --kernel` starts one beside it";
            if let Some(firmware) = &manifest.firmware {
                let hint = match firmware {
                    Firmware::Uefi => "which bedplate-vmm cannot start yet",
                    Firmware::Bios | Firmware::Either => "which `bedplate run` starts with SeaBIOS",
                };
                text += &format!("\nfirmware  {}: it has a boot loader of its own, {hint}", output::word(firmware));
            }
        }
    }
    for (key, value) in &manifest.labels {
        text += &format!("\nlabel     {key}={value}");
    }
    text += &format!("\nchunks    {}, {} missing here", missing.total, missing.chunks);
    Ok(output::line(&text)?)
}

pub(super) fn gc(store: &Store, grace: Duration, format: Format) -> Result<(), Error> {
    let swept = store.gc_with(grace, || Ok::<_, Error>(rundir::images_in_use(store)?))?;
    print_swept(&swept, format)
}

/// What a garbage collection took out, here or elsewhere.
pub(super) fn print_swept(swept: &Swept, format: Format) -> Result<(), Error> {
    match format {
        Format::Json => output::json(swept)?,
        Format::Table => note(&format!("{} objects removed, {} freed", swept.removed, output::bytes(swept.bytes))),
    }
    Ok(())
}

/// What `verify` prints about one image as JSON.
#[derive(Serialize)]
#[serde(untagged)]
enum Verified {
    Good(ImageSummary),
    Bad { name: String, digest: Option<Digest>, error: String },
}

pub(super) fn verify(store: &Store, name: Option<String>, format: Format) -> Result<(), Error> {
    let names = match &name {
        Some(name) => vec![name.clone()],
        None => store.each_tag()?.into_iter().map(|(name, _)| name).collect(),
    };
    let (mut images, mut errors) = (Vec::new(), Vec::new());
    for image in names {
        match verify_one(store, &image) {
            Ok(summary) => images.push(Verified::Good(summary)),
            // Removed since the names were listed.
            Err(StoreError::TagMissing { .. }) if name.is_none() => {}
            Err(error) => {
                if name.is_none() {
                    note(&format!("{image}: {error}"));
                }
                let digest = store.resolve(&image).ok();
                images.push(Verified::Bad { name: image, digest, error: error.to_string() });
                errors.push(error);
            }
        }
    }
    if format == Format::Json {
        output::json(&images)?;
    }
    match (errors.len(), name) {
        (0, _) => Ok(()),
        // Who asked for one has not been told yet.
        (_, Some(_)) => Err(errors.remove(0).into()),
        (damaged, None) => Err(Error::Damaged { damaged, all: images.len() }),
    }
}

fn verify_one(store: &Store, name: &str) -> Result<ImageSummary, StoreError> {
    // What is being read must not be removed meanwhile. A store that may only be read has nobody who would.
    let _lease = store.lease().ok();
    let image = store.summary(name)?;
    let progress = Progress::new(format!("verify {name}"), image.content);
    store.verify(&image.digest)?;
    progress.finish(&format!("{} are what they should be", output::bytes(image.content)));
    Ok(image)
}

pub(super) fn export(
    store: &Store,
    name: &str,
    part: &str,
    file: PathBuf,
    format: Option<FileFormat>,
) -> Result<(), Error> {
    if file.symlink_metadata().is_ok() {
        return Err(Error::Exists(file));
    }
    let by_name = || if file.extension().is_some_and(|e| e == "qcow2") { FileFormat::Qcow2 } else { FileFormat::Raw };
    // As for `verify`.
    let _lease = store.lease().ok();
    let digest = store.resolve(name)?;
    let progress = Progress::new(format!("export {name}"), 0);
    let format = format.unwrap_or_else(by_name);
    export::export(store, &digest, part, &file, format.into(), &mut |done, total| progress.set(done, total))?;
    progress.finish(&format!("part {part} is in {} as {}", file.display(), output::word(&format)));
    Ok(())
}
