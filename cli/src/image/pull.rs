//! From a repository to the local store. Everything is verified as it is kept; a pull that broke off goes on where it
//! stopped, since what is here is not fetched again.

use bedplate_api::Digest;
use bedplate_api::client::{Client, Endpoint};
use bedplate_api::image::MAX_CHUNK_LIST;
use bedplate_images::{CHUNK_SIZE, Store};

use super::sign::SignError;
use super::{Error, note_moved, print_one, tag_for};
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
    let lease = store.lease()?;
    let session = Session::open(endpoint)?;
    let (tag, digest) = session.run(async |client| {
        let digest = client.image(name).await?.digest;
        let tag = tag_for(name, to, &digest)?;
        fetch(store, &digest, name, client).await?;
        if let Some(signature) = client.signature(&digest).await? {
            store.put_signature(&digest, &signature).map_err(SignError::from)?;
        }
        Ok::<_, Error>((tag, digest))
    })?;
    let before = store.tag(&tag).ok();
    store.set_tag(&tag, &digest)?;
    drop(lease);
    note_moved(&tag, before, &digest);
    Ok(print_one(&store.summary(&tag)?, format)?)
}

async fn fetch(store: &Store, image: &Digest, name: &str, client: &Client) -> Result<(), Error> {
    fetch_blob(store, image, client).await?;
    for part in store.manifest(image)?.parts.values() {
        fetch_blob(store, &part.index, client).await?;
    }
    let chunks = store.distinct_chunks(image)?;
    let missing = store.missing(&chunks);
    store.need_space("the pull", missing.len() as u64 * CHUNK_SIZE as u64)?;
    let progress = Progress::new(format!("pull {name}"), missing.len() as u64 * CHUNK_SIZE as u64);
    let mut received = 0;
    for list in missing.chunks(MAX_CHUNK_LIST) {
        let keep = client.fetch_chunks(list.to_vec(), async |digest, frame| {
            received += frame.len() as u64;
            progress.add(CHUNK_SIZE as u64);
            store.put_frame(&digest, &frame).map_err(|e| e.to_string())
        });
        keep.await?;
        let unsent = store.missing(list).len();
        if unsent > 0 {
            return Err(Error::Unsent { endpoint: client.endpoint().clone(), count: unsent });
        }
    }
    let (fetched, all) = (missing.len(), chunks.len());
    progress.finish(&format!("{fetched} of {all} chunks fetched ({})", output::bytes(received)));
    Ok(())
}

async fn fetch_blob(store: &Store, digest: &Digest, client: &Client) -> Result<(), Error> {
    if !store.has_blob(digest) {
        let bytes = client.blob(digest).await?;
        store.put_blob_as(digest, &bytes)?;
    }
    Ok(())
}
