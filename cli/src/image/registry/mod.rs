//! Images in any OCI registry, as `docs/image-format.md` describes them: packs of chunks are blobs.
//!
//! The protocol is the library's business; here is what an image needs of it. `oci://HOST[:PORT]/NAME[:TAG]` names one.

mod container;
mod pull;
mod push;

use std::io;
use std::time::Duration;

use bedplate_api::error::with_causes;
use bedplate_images::StoreError;
use bedplate_images::pack::oci::{Descriptor, OciError};
use bedplate_images::trust::TrustError;
use bytes::{Bytes, BytesMut};
use docker_credential::{CredentialRetrievalError, DockerCredential};
use futures_util::StreamExt;
use oci_client::client::{BlobResponse, ClientConfig, ClientProtocol, SizedStream};
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};
use tokio::runtime::{Builder, Runtime};

pub(super) use container::import;
pub(super) use pull::run as pull;
pub(super) use push::run as push;

/// What a reference to a registry begins with.
pub(super) const SCHEME: &str = "oci://";

const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// A registry may look for a blob in another data centre before the first byte comes.
const READ_TIMEOUT: Duration = Duration::from_secs(60);

/// How to speak with a registry.
#[derive(Debug, clap::Args)]
pub(super) struct RegistryArgs {
    /// Speak plain http with the registry; any other way is https with this machine's certificates
    #[arg(long)]
    pub(super) insecure: bool,
}

/// Why an image could not be sent to a registry or fetched from one.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Not a reference.
    #[error("{text:?} names no image in a registry ({cause}): write oci://HOST[:PORT]/NAME[:TAG]")]
    Reference {
        /// As given.
        text: String,
        /// What is wrong.
        cause: String,
    },
    /// Something that only an image with a tag can have done to it.
    #[error("{0} names an image by its digest, which cannot be given to another: write a tag instead")]
    NoTag(String),
    /// Credentials that cannot be read.
    #[error("the credentials for {registry} cannot be read from Docker's configuration: {cause}; log in again")]
    Credentials {
        /// Whose.
        registry: String,
        /// Why not.
        cause: String,
    },
    /// The registry wants to know who this is, or does not like it.
    #[error("{registry} wants other credentials to {what} {image}: {hint}")]
    Unauthorized {
        /// Who.
        registry: String,
        /// What was tried.
        what: &'static str,
        /// Of which image.
        image: String,
        /// What to do.
        hint: &'static str,
    },
    /// It has no such image.
    #[error("there is no image {0}: is its name right, and was it pushed?")]
    NotFound(String),
    /// Nobody is there, or he speaks something else.
    #[error("cannot {what} {image}: {cause}{hint}")]
    Talk {
        /// What was tried.
        what: &'static str,
        /// Of which image.
        image: String,
        /// Why not.
        cause: String,
        /// What to do, if that is known.
        hint: &'static str,
    },
    /// What came is not what it should be.
    #[error("{image} cannot be used: {cause}")]
    Oci {
        /// Which.
        image: String,
        /// What is wrong.
        cause: OciError,
    },
    /// A blob that ended early, or went on.
    #[error("{image}: the registry sent {found} bytes of the blob {digest}, which has {wanted}: try again")]
    Length {
        /// Which.
        image: String,
        /// The blob.
        digest: String,
        /// Bytes that came.
        found: u64,
        /// Bytes that were to come.
        wanted: u64,
    },
    /// The packs lack something.
    #[error("{image} is not whole: its packs lack {count} of its chunks; push it again from where it is whole")]
    Missing {
        /// Which.
        image: String,
        /// How many.
        count: usize,
    },
    /// The local store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What came as a signature.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The process is out of threads or descriptors.
    #[error("cannot set up what speaks with a registry: {0}")]
    Setup(io::Error),
}

/// One image, or its place, in a registry.
pub(super) struct Registry {
    client: Client,
    auth: RegistryAuth,
    reference: Reference,
    runtime: Runtime,
}

impl Registry {
    /// The image that `text` names. Connects at the first call.
    pub(super) fn open(text: &str, args: &RegistryArgs) -> Result<Self, RegistryError> {
        let refused = |cause: String| RegistryError::Reference { text: text.chars().take(300).collect(), cause };
        let bare = text.strip_prefix(SCHEME).ok_or_else(|| refused("it does not begin with oci://".to_owned()))?;
        let reference: Reference = bare.parse().map_err(|e: oci_client::ParseError| refused(e.to_string()))?;
        let registry = reference.resolve_registry().to_owned();
        let auth = credentials(reference.registry()).map_err(|cause| RegistryError::Credentials { registry, cause })?;
        // Before the first client is made. The second call finds the choice of the first, which is the same.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let config = ClientConfig {
            protocol: if args.insecure { ClientProtocol::Http } else { ClientProtocol::Https },
            // A pack is in memory anyway; one request instead of one for every few MiB.
            use_monolithic_push: true,
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(READ_TIMEOUT),
            user_agent: concat!("bedplate/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        };
        let setup = |e: OciDistributionError| RegistryError::Setup(io::Error::other(e.to_string()));
        let client = Client::try_from(config).map_err(setup)?;
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build();
        Ok(Self { client, auth, reference, runtime: runtime.map_err(RegistryError::Setup)? })
    }

    /// What to call it.
    fn image(&self) -> String {
        format!("{SCHEME}{}", self.reference)
    }

    /// The last part of its name: what a person would call it.
    fn short_name(&self) -> &str {
        self.reference.repository().rsplit('/').next().unwrap_or_default()
    }

    fn talk(&self, what: &'static str) -> impl Fn(OciDistributionError) -> RegistryError {
        let (image, registry) = (self.image(), self.reference.resolve_registry().to_owned());
        let anonymous = matches!(self.auth, RegistryAuth::Anonymous);
        move |error| {
            let image = image.clone();
            match error {
                error if is_unauthorized(&error) => RegistryError::Unauthorized {
                    registry: registry.clone(),
                    what,
                    image,
                    hint: match anonymous {
                        true => "none are in Docker's configuration; log in with `docker login` or `skopeo login`",
                        false => "those in Docker's configuration are not enough; log in as somebody who may do this",
                    },
                },
                error if is_not_found(&error) => RegistryError::NotFound(image),
                error => RegistryError::Talk { what, image, hint: hint(&error), cause: with_causes(&error) },
            }
        }
    }

    fn oci(&self) -> impl Fn(OciError) -> RegistryError {
        let image = self.image();
        move |cause| RegistryError::Oci { image: image.clone(), cause }
    }

    async fn log_in(&self, operation: RegistryOperation) -> Result<(), RegistryError> {
        self.client.auth(&self.reference, &self.auth, operation).await.map_err(self.talk("log in for"))?;
        Ok(())
    }

    /// The whole blob, verified; it is as small as `descriptor` says, which the caller has checked.
    async fn blob(&self, descriptor: &Descriptor) -> Result<Vec<u8>, RegistryError> {
        let digest = descriptor.digest.as_str();
        let stream = self.client.pull_blob_stream(&self.reference, digest).await.map_err(self.talk("fetch"))?;
        let mut stream = stream.stream;
        let mut bytes = Vec::new();
        while let Some(piece) = stream.next().await {
            bytes.extend_from_slice(&piece.map_err(OciDistributionError::from).map_err(self.talk("fetch"))?);
            if bytes.len() as u64 > descriptor.size {
                break;
            }
        }
        if bytes.len() as u64 == descriptor.size {
            return Ok(bytes);
        }
        Err(self.length(digest, bytes.len() as u64, descriptor.size))
    }

    fn length(&self, digest: &str, found: u64, wanted: u64) -> RegistryError {
        RegistryError::Length { image: self.image(), digest: digest.to_owned(), found, wanted }
    }

    /// Opens `len` bytes of a blob from `at`. Nothing is verified: what is cut out of it is.
    async fn range(&self, digest: &str, at: u64, len: u64) -> Result<Pieces, RegistryError> {
        let response = self.client.pull_blob_stream_partial(&self.reference, digest, at, Some(len)).await;
        let (SizedStream { stream, .. }, begin) = match response.map_err(self.talk("fetch"))? {
            // A registry that knows no ranges sends everything.
            BlobResponse::Full(stream) => (stream, 0),
            BlobResponse::Partial(stream) => (stream, at),
        };
        Ok(Pieces { stream, pending: BytesMut::new(), at: begin })
    }

    /// The next `len` bytes from `at` on, which is not before where `pieces` are.
    async fn take(&self, digest: &str, pieces: &mut Pieces, at: u64, len: usize) -> Result<Bytes, RegistryError> {
        while pieces.at + (pieces.pending.len() as u64) < at + len as u64 {
            // What lies before `at` is not wanted: it does not pile up.
            pieces.drop_until(at);
            match pieces.stream.next().await {
                Some(piece) => {
                    let piece = piece.map_err(OciDistributionError::from).map_err(self.talk("fetch"))?;
                    pieces.pending.extend_from_slice(&piece);
                }
                None => return Err(self.length(digest, pieces.at + pieces.pending.len() as u64, at + len as u64)),
            }
        }
        pieces.drop_until(at);
        pieces.at += len as u64;
        Ok(pieces.pending.split_to(len).freeze())
    }
}

/// A blob, or a range of it, as it arrives.
struct Pieces {
    stream: futures_util::stream::BoxStream<'static, Result<Bytes, io::Error>>,
    pending: BytesMut,
    /// Where in the blob `pending` begins.
    at: u64,
}

impl Pieces {
    fn drop_until(&mut self, at: u64) {
        // No more than the length of what is there.
        let len = at.saturating_sub(self.at).min(self.pending.len() as u64) as usize;
        let _ = self.pending.split_to(len);
        self.at += len as u64;
    }
}

/// Who this is for `registry`, as Docker's configuration says; nobody where it does not.
fn credentials(registry: &str) -> Result<RegistryAuth, String> {
    // Docker files its own registry under an address of long ago.
    let server = if registry == "docker.io" { "https://index.docker.io/v1/" } else { registry };
    match docker_credential::get_credential(server) {
        Ok(DockerCredential::UsernamePassword(user, password)) => Ok(RegistryAuth::Basic(user, password)),
        Ok(DockerCredential::IdentityToken(_)) => Err("it has an identity token, which is not understood here".into()),
        // The library says the same of a file that is not there and of one that cannot be opened.
        Err(CredentialRetrievalError::ConfigNotFound | CredentialRetrievalError::ConfigReadError)
        | Err(CredentialRetrievalError::NoCredentialConfigured) => Ok(RegistryAuth::Anonymous),
        Err(error) => Err(error.to_string()),
    }
}

fn codes(error: &OciDistributionError) -> Vec<&OciErrorCode> {
    match error {
        OciDistributionError::RegistryError { envelope, .. } => envelope.errors.iter().map(|e| &e.code).collect(),
        _ => Vec::new(),
    }
}

fn is_unauthorized(error: &OciDistributionError) -> bool {
    let denied = |code: &&OciErrorCode| matches!(code, OciErrorCode::Unauthorized | OciErrorCode::Denied);
    match error {
        OciDistributionError::UnauthorizedError { .. } | OciDistributionError::AuthenticationFailure(_) => true,
        OciDistributionError::ServerError { code, .. } => matches!(code, 401 | 403),
        OciDistributionError::RequestError(e) => e.status().is_some_and(|status| matches!(status.as_u16(), 401 | 403)),
        other => codes(other).iter().any(denied),
    }
}

fn is_not_found(error: &OciDistributionError) -> bool {
    let unknown = |code: &&OciErrorCode| matches!(code, OciErrorCode::ManifestUnknown | OciErrorCode::NameUnknown);
    match error {
        OciDistributionError::ImageManifestNotFoundError(_) => true,
        OciDistributionError::ServerError { code, .. } => *code == 404,
        other => codes(other).iter().any(unknown),
    }
}

fn hint(error: &OciDistributionError) -> &'static str {
    match error {
        OciDistributionError::RequestError(e) if e.is_connect() => {
            "; is a registry there, and does it speak https? For plain http there is --insecure"
        }
        OciDistributionError::RequestError(e) if e.is_timeout() => "; it does not answer, try again later",
        _ => "",
    }
}
