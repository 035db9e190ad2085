//! From the local store to a repository: chunks first, then what names them, the tag last, so that the repository never
//! has a name for half an image.

use bedplate_api::Digest;
use bedplate_api::client::{Client, Endpoint, encode_frame};
use bedplate_api::image::MAX_CHUNK_LIST;
use bedplate_images::{Store, StoreError};

use super::{Error, print_one, tag_for};
use crate::control::Session;
use crate::output::{self, Format};
use crate::progress::Progress;

pub(super) fn run(
    store: &Store,
    name: &str,
    to: Option<String>,
    endpoint: &Endpoint,
    format: Format,
) -> Result<(), Error> {
    let _lease = store.lease()?;
    let digest = store.resolve(name)?;
    let tag = tag_for(name, to, &digest)?;
    let session = Session::open(endpoint)?;
    let image = session.run(async |client| {
        send(store, &digest, name, client).await?;
        Ok::<_, Error>(client.tag_signed_image(&tag, digest, store.signature(&digest)?).await?)
    })?;
    Ok(print_one(&image, format)?)
}

async fn send(store: &Store, image: &Digest, name: &str, client: &Client) -> Result<(), Error> {
    let manifest = store.manifest(image)?;
    let chunks = store.distinct_chunks(image)?;
    let chunk_size = bedplate_images::CHUNK_SIZE as u64;
    let progress = Progress::new(format!("push {name}"), chunks.len() as u64 * chunk_size);
    let (mut sent, mut sent_bytes) = (0, 0);
    for list in chunks.chunks(MAX_CHUNK_LIST) {
        let missing = client.missing_chunks(list.to_vec()).await?;
        if !missing.is_empty() {
            let frames = missing.iter().map(|digest| Ok(encode_frame(digest, &store.frame(digest)?)));
            let frames = frames.collect::<Result<Vec<_>, StoreError>>()?;
            sent += frames.len();
            sent_bytes += frames.iter().map(|frame| frame.len() as u64).sum::<u64>();
            client.put_chunks(frames).await?;
        }
        progress.add(list.len() as u64 * chunk_size);
    }
    for part in manifest.parts.values() {
        client.put_blob(&part.index, store.blob(&part.index)?).await?;
    }
    client.put_blob(image, store.blob(image)?).await?;
    progress.finish(&format!("{sent} of {} chunks sent ({})", chunks.len(), output::bytes(sent_bytes)));
    Ok(())
}
