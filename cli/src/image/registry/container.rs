//! A disk inside a container image of a registry.

use std::io::{self, Read};
use std::ops::ControlFlow;
use std::path::Path;

use bedplate_images::Store;
use bedplate_images::import::container::{Blobs, MANIFESTS, import_container};
use bedplate_images::import::{ImportError, Imported, Options};
use bedplate_images::pack::oci::Descriptor;
use bytes::{Buf, Bytes};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use oci_client::RegistryOperation;
use tokio::runtime::Runtime;

use super::{Registry, RegistryArgs, RegistryError};
use crate::image::Error;
use crate::progress::Progress;

/// Imports the disk in the container image that `from` names.
pub(in crate::image) fn import(
    store: &Store,
    from: &str,
    args: &RegistryArgs,
    options: Options<'_>,
    progress: &Progress,
) -> Result<Imported, Error> {
    let mut registry = Registry::open(from, args)?;
    let manifest = registry.runtime.block_on(async {
        registry.log_in(RegistryOperation::Pull).await?;
        let pulled = registry.client.pull_manifest_raw(&registry.reference, &registry.auth, &MANIFESTS).await;
        Ok::<_, RegistryError>(pulled.map_err(registry.talk("pull"))?.0)
    })?;
    let path = registry.image();
    let mut told = |done, total| {
        progress.set(done, total);
        ControlFlow::Continue(())
    };
    Ok(import_container(store, &mut registry, &manifest, Path::new(&path), options, &mut told)?)
}

impl Registry {
    fn failed(&self) -> impl Fn(RegistryError) -> ImportError {
        let path = self.image();
        move |error| ImportError::Io { what: "fetch", path: (&path).into(), cause: io::Error::other(error.to_string()) }
    }
}

impl Blobs for Registry {
    fn manifest(&mut self, digest: &str) -> Result<Vec<u8>, ImportError> {
        let reference = self.reference.clone_with_digest(digest.to_owned());
        let pulled = self.runtime.block_on(self.client.pull_manifest_raw(&reference, &self.auth, &MANIFESTS));
        Ok(pulled.map_err(self.talk("pull")).map_err(self.failed())?.0.to_vec())
    }

    fn layer(&mut self, layer: &Descriptor) -> Result<Box<dyn Read + '_>, ImportError> {
        let opened = self.runtime.block_on(self.client.pull_blob_stream(&self.reference, layer.digest.as_str()));
        let stream = opened.map_err(self.talk("fetch")).map_err(self.failed())?.stream;
        Ok(Box::new(Waiting { stream, pending: Bytes::new(), runtime: &self.runtime }))
    }
}

/// A stream that is waited for. The library fails it at its end when the digest is another one.
struct Waiting<'a> {
    stream: BoxStream<'static, Result<Bytes, io::Error>>,
    pending: Bytes,
    runtime: &'a Runtime,
}

impl Read for Waiting<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        while self.pending.is_empty() {
            match self.runtime.block_on(self.stream.next()) {
                Some(piece) => self.pending = piece?,
                None => return Ok(0),
            }
        }
        let len = bytes.len().min(self.pending.len());
        self.pending.copy_to_slice(&mut bytes[..len]);
        Ok(len)
    }
}
