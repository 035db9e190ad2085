//! What needs the local store only.

use std::path::PathBuf;
use std::time::Duration;

use bedplate_api::image::{ImageKind, ImageSummary};
use bedplate_images::{Store, StoreError};
use comfy_table::Cell;
use serde_json::json;

use super::Error;
use crate::output::{self, Format, PrintError};
use crate::progress::Progress;
use crate::rundir;

pub(super) fn ls(dir: PathBuf, format: Format) -> Result<(), Error> {
    let images = match Store::open(dir) {
        Ok(store) => summaries(&store)?,
        // Nothing was ever imported; nothing is wrong.
        Err(StoreError::NotAStore { dir }) if !dir.exists() => Vec::new(),
        Err(e) => return Err(e.into()),
    };
    Ok(print(&images, format, "No image yet; `bedplate image import FILE --name NAME` makes one.")?)
}

fn summaries(store: &Store) -> Result<Vec<ImageSummary>, StoreError> {
    store.tags()?.iter().map(|(name, _)| store.summary(name)).collect()
}

pub(super) fn print(images: &[ImageSummary], format: Format, empty: &str) -> Result<(), PrintError> {
    output::list(format, images, empty, &["NAME", "DIGEST", "KIND", "SIZE", "CONTENT", "BOOT"], |image| {
        let boot = match (image.kind, image.direct_boot) {
            (_, true) => "direct",
            (ImageKind::Disk, false) => "no kernel found",
            (ImageKind::Vmm, false) => "-",
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
    match &manifest.boot {
        Some(boot) => {
            let initrd = boot.initrd.as_ref().map(|part| format!(" with part {part}")).unwrap_or_default();
            text += &format!("\nboot      part {}{initrd}\ncmdline   {}", boot.kernel, boot.cmdline);
        }
        None => text += "\nboot      no kernel was found inside: `bedplate run --kernel` starts it",
    }
    for (key, value) in &manifest.labels {
        text += &format!("\nlabel     {key}={value}");
    }
    text += &format!("\nchunks    {}, {} missing here", missing.total, missing.chunks);
    Ok(output::line(&text)?)
}

pub(super) fn gc(store: &Store, grace: Duration, format: Format) -> Result<(), Error> {
    let swept = store.gc(&rundir::images_in_use(store), grace)?;
    match format {
        Format::Json => output::json(&json!({ "removed": swept.removed, "bytes": swept.bytes }))?,
        Format::Table => {
            output::note(&format!("{} objects removed, {} freed", swept.removed, output::bytes(swept.bytes)))
        }
    }
    Ok(())
}

pub(super) fn verify(store: &Store, name: Option<String>, format: Format) -> Result<(), Error> {
    let names = match name {
        Some(name) => vec![name],
        None => store.tags()?.into_iter().map(|(name, _)| name).collect(),
    };
    let mut good = Vec::new();
    for name in names {
        let image = store.summary(&name)?;
        let progress = Progress::new(format!("verify {name}"), image.content);
        store.verify(&image.digest)?;
        progress.finish(&format!("{} are what they should be", output::bytes(image.content)));
        good.push(image);
    }
    if format == Format::Json {
        output::json(&good)?;
    }
    Ok(())
}

pub(super) fn export(store: &Store, name: &str, part: &str, file: PathBuf) -> Result<(), Error> {
    if file.symlink_metadata().is_ok() {
        return Err(Error::Exists(file));
    }
    let digest = store.resolve(name)?;
    store.materialise(&digest, part, &file)?;
    output::note(&format!("wrote part {part} of {name} to {}", file.display()));
    Ok(())
}
