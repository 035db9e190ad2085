//! `bedplate image`: the local store, and the way between it and a control node's repository.

use std::path::PathBuf;
use std::time::Duration;

use bedplate_api::Digest;
use bedplate_api::client::Endpoint;
use bedplate_images::capture::CaptureError;
use bedplate_images::disk::DiskError;
use bedplate_images::import::{ImportError, SuspendedFiles};
use bedplate_images::{Store, StoreError, export};
use clap::Subcommand;

use crate::control::{self, CONTROL_VARIABLE, DEFAULT_CONTROL, Session};
use crate::output::{self, Format, PrintError};
use crate::place::{PlaceError, StoreArgs};
use crate::rundir::RunDirError;
use registry::RegistryArgs;
pub use registry::RegistryError;
pub use sign::SignError;

mod capture;
pub(crate) mod import;
mod local;
mod pull;
mod push;
mod registry;
mod sign;

/// `bedplate image …`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  bedplate image import debian-12.qcow2 --name debian
  curl -L https://example.org/disk.raw.xz | bedplate image import - --name web
  bedplate image import-vmm --kernel vmlinuz --initrd initrd --name vmm
  bedplate image ls
  bedplate image push web --as web-2
  bedplate image pull web
  bedplate image push web oci://registry.example:5000/team/web:2
  bedplate image pull oci://registry.example:5000/team/web:2 --as web
  bedplate image import oci://quay.io/containerdisks/debian:12 --name debian
  bedplate image tag web web-before-update
  bedplate image ls --control
  bedplate image verify web
  bedplate image capture my-web web-golden
  bedplate image export web web.qcow2")]
pub struct Args {
    #[command(flatten)]
    store: StoreArgs,
    #[command(subcommand)]
    action: Action,
}

/// The repository of a control node, instead of the local store.
#[derive(Debug, clap::Args)]
struct Remote {
    /// In the repository of a control node (at this endpoint, else at BEDPLATE_CONTROL, else on this machine)
    #[arg(long, num_args = 0..=1, value_name = "ENDPOINT")]
    control: Option<Option<Endpoint>>,
}

/// The control node to copy to or from.
#[derive(Debug, clap::Args)]
struct Peer {
    /// The control node: unix:/path or http://host:port
    #[arg(long, env = CONTROL_VARIABLE, default_value = DEFAULT_CONTROL, value_name = "ENDPOINT")]
    control: Endpoint,
}

/// What an image is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "snake_case")]
enum FileFormat {
    Raw,
    Qcow2,
}

impl From<FileFormat> for export::Format {
    fn from(format: FileFormat) -> Self {
        match format {
            FileFormat::Raw => Self::Raw,
            FileFormat::Qcow2 => Self::Qcow2,
        }
    }
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Import a disk image: raw, qcow2 or flat VMDK, raw and qcow2 also packed with gzip, xz or zstd. Chunks that the store
    /// has are not written again, so an import that was interrupted goes on when it is started again
    Import {
        /// The file or block device; - is standard input, oci://HOST/NAME:TAG or a directory in the OCI layout a container
        /// image with a disk in it
        file: PathBuf,
        /// Name to give it: lower-case letters, digits, and . _ -; one that another image has is taken from it, and
        /// stderr says what it was
        #[arg(long)]
        name: String,
        #[command(flatten)]
        registry: RegistryArgs,
        /// A file elsewhere that FILE may refer to as its backing or data file; can be given several times
        #[arg(long, value_name = "FILE")]
        allow: Vec<PathBuf>,
    },
    /// Make a VMM image, which boots blank machines into nodes
    ImportVmm {
        /// Its kernel
        #[arg(long, value_name = "FILE")]
        kernel: PathBuf,
        /// Its initial RAM disk, with bedplate-node as init
        #[arg(long, value_name = "FILE")]
        initrd: PathBuf,
        /// Words for the kernel's command line
        #[arg(long, default_value = "", value_name = "WORDS")]
        cmdline: String,
        /// Name to give it, which is taken from the image that has it
        #[arg(long, default_value = "vmm")]
        name: String,
    },
    /// Make an image of a suspended guest, from the files that a snapshot of its VMM left
    ImportSuspended {
        /// Its memory, from address 0 on, such as the memory file of a Firecracker snapshot
        #[arg(long, value_name = "FILE")]
        memory: PathBuf,
        /// What its VMM wrote of processors and devices
        #[arg(long, value_name = "FILE")]
        state: PathBuf,
        /// Its disk at that moment: raw, qcow2 or flat VMDK
        #[arg(long, value_name = "FILE")]
        disk: Option<PathBuf>,
        /// Name to give it, which is taken from the image that has it
        #[arg(long)]
        name: String,
        /// A file elsewhere that the disk may refer to as its backing or data file; can be given several times
        #[arg(long, value_name = "FILE")]
        allow: Vec<PathBuf>,
    },
    /// List images
    Ls {
        #[command(flatten)]
        remote: Remote,
    },
    /// Show an image: its manifest, and how many of its chunks are missing here
    Inspect {
        /// Its name or digest; the first 12 digits that `ls` shows are enough, here and wherever a digest is asked for
        name: String,
    },
    /// Give an image another name, and take that from the image that has it; the names it has stay
    Tag {
        /// Its name or digest
        name: String,
        /// The other name
        new: String,
        #[command(flatten)]
        remote: Remote,
    },
    /// Remove a name; what no other name needs goes with the next `gc`
    Rm {
        /// The name
        name: String,
        #[command(flatten)]
        remote: Remote,
    },
    /// Send an image to a control node's repository or an OCI registry; only what is lacking there is sent
    Push {
        /// Its name or digest here
        name: String,
        /// Where to in a registry: oci://HOST[:PORT]/NAME[:TAG] [default: the control node]
        #[arg(conflicts_with = "to")]
        registry: Option<String>,
        #[command(flatten)]
        how: RegistryArgs,
        /// Its name there [default: the name here]
        #[arg(long = "as", value_name = "NAME")]
        to: Option<String>,
        #[command(flatten)]
        peer: Peer,
    },
    /// Fetch an image from a control node's repository or an OCI registry; only what is missing here is fetched
    Pull {
        /// Its name or digest at the control node, or oci://HOST[:PORT]/NAME[:TAG]
        name: String,
        #[command(flatten)]
        how: RegistryArgs,
        /// Its name here [default: the name there]
        #[arg(long = "as", value_name = "NAME")]
        to: Option<String>,
        #[command(flatten)]
        peer: Peer,
    },
    /// Remove what no name and no disk of a VM needs; at a control node, what no name, no tier and no VM of the cluster needs
    Gc {
        /// Keep what is younger than this many seconds
        #[arg(long, default_value_t = 3600, value_name = "SECONDS")]
        grace: u64,
        #[command(flatten)]
        remote: Remote,
    },
    /// Read every byte of images and compare it with its digest
    Verify {
        /// Name or digest; all names where none is given
        name: Option<String>,
        /// First check that the image was signed with this minisign public key
        #[arg(long, value_name = "FILE", requires = "name")]
        key: Option<PathBuf>,
    },
    /// Sign an image: its manifest, which names all of its content by digest
    #[command(
        after_help = "Where STORE/trust has public keys (*.pub), nothing boots that none of them signed: here, on a \
                            control node or on a node, whose stores are STATE/images."
    )]
    Sign {
        /// Its name or digest
        name: String,
        /// The secret key that `minisign -G` made; its password is asked for, if it has one
        #[arg(long, value_name = "FILE", required_unless_present = "signature")]
        key: Option<PathBuf>,
        /// Take this signature, made with `minisign -S` of the file STORE/blobs/{first two digits}/{digest}, instead
        #[arg(long, value_name = "FILE", conflicts_with = "key")]
        signature: Option<PathBuf>,
    },
    /// Make an image of the disk that a VM of `bedplate run --persistent` left, without what belongs to that one machine
    Capture {
        /// The VM's name, or the directory of a disk
        vm: String,
        /// Name to give the image, which is taken from the image that has it
        name: String,
        /// Leave machine id, host keys, leases, logs and the like in it
        #[arg(long)]
        keep_identity: bool,
    },
    /// Write a part of an image to a file
    Export {
        /// Its name or digest
        name: String,
        /// The file; must not be there yet
        file: PathBuf,
        /// Which part: disk, kernel or initrd; of a suspended guest memory, state or disk
        #[arg(long, default_value = "disk")]
        part: String,
        /// What to write: raw or qcow2 [default: qcow2 where the file's name ends so, else raw]
        #[arg(long, value_enum, hide_possible_values = true)]
        format: Option<FileFormat>,
    },
}

/// Why a command about images failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No place for the store.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The store, or what is in it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file is no image.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// A VM's disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// What was to be made of it.
    #[error(transparent)]
    Capture(#[from] CaptureError),
    /// Where a VM's disk should be.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// Not captured, because it is not there.
    #[error(
        "{vm:?} has no persistent disk ({} is none); `bedplate run --persistent` makes them, and those of `--lab` cannot be \
         captured",
        dir.display()
    )]
    NoDisk {
        /// As given.
        vm: String,
        /// Where it was looked for.
        dir: PathBuf,
    },
    /// A disk that is its image again at each start.
    #[error("{} is not persistent: what its VM wrote is not kept, so there is nothing to capture", .0.display())]
    NotKept(PathBuf),
    /// The control node.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// A registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A signature.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// Something else than a registry.
    #[error("{0:?} is no place in a registry: write oci://HOST[:PORT]/NAME[:TAG], or --as NAME for the control node")]
    NoRegistry(String),
    /// A file that is there already is not written over.
    #[error("{} is there already; remove it or name another file", .0.display())]
    Exists(PathBuf),
    /// Names of the store that could not be listed.
    #[error("{count} names in the image store {} cannot be read; how to remove each is said above", dir.display())]
    Unreadable {
        /// How many.
        count: usize,
        /// The store.
        dir: PathBuf,
    },
    /// What `verify` found.
    #[error("{damaged} of {all} images are damaged; what is wrong with each is said above: copy or import them again")]
    Damaged {
        /// How many.
        damaged: usize,
        /// Of how many.
        all: usize,
    },
    /// A digest is no name.
    #[error("{0} is a digest; say under which name with --as")]
    NameNeeded(String),
    /// A chunk list of the other side that does not fit what was asked.
    #[error(
        "the repository at {endpoint} did not send {count} of the chunks that it was asked for; try again, and if it stays, `bedplate-control` there has lost data"
    )]
    Unsent {
        /// Whom we asked.
        endpoint: Endpoint,
        /// How many.
        count: usize,
    },
    /// Stdout is gone.
    #[error(transparent)]
    Print(#[from] PrintError),
}

impl From<bedplate_api::client::ClientError> for Error {
    fn from(error: bedplate_api::client::ClientError) -> Self {
        Self::Control(error.into())
    }
}

/// Runs it.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args, format: Format) -> Result<(), Error> {
    let dir = args.store.dir()?;
    match args.action {
        Action::Import { file, name, registry, allow } => {
            import::run(&Store::create(dir)?, &file, &name, &allow, &registry, format)?;
        }
        Action::ImportVmm { kernel, initrd, cmdline, name } => {
            import::run_vmm(&Store::create(dir)?, &kernel, &initrd, &cmdline, &name, format)?;
        }
        Action::ImportSuspended { memory, state, disk, name, allow } => {
            let files = SuspendedFiles { memory: &memory, state: &state, disk: disk.as_deref(), allow: &allow };
            import::run_suspended(&Store::create(dir)?, files, &name, format)?;
        }
        Action::Ls { remote: Remote { control: Some(endpoint) } } => {
            let session = session(endpoint)?;
            let images = session.wait(session.client.images())?;
            local::print(&images, format, "The repository is empty; `bedplate image push` fills it.")?;
        }
        Action::Ls { .. } => local::ls(dir, format)?,
        Action::Inspect { name } => local::inspect(&Store::open(dir)?, &name, format)?,
        Action::Tag { name, new, remote: Remote { control: Some(endpoint) } } => {
            let session = session(endpoint)?;
            let (before, image) = session.run(async |client| {
                let digest = client.image(&name).await?.digest;
                // One that cannot be told is not worth stopping for.
                let before = client.image(&new).await.ok().map(|image| image.digest);
                Ok::<_, Error>((before, client.tag_image(&new, digest).await?))
            })?;
            note_moved(&new, before, &image.digest);
            print_one(&image, format)?;
        }
        Action::Tag { name, new, .. } => local::tag(&Store::open(dir)?, &name, &new, format)?,
        Action::Rm { name, remote: Remote { control: Some(endpoint) } } => {
            let session = session(endpoint)?;
            session.wait(session.client.untag_image(&name))?;
        }
        Action::Rm { name, .. } => Store::open(dir)?.remove_tag(&name)?,
        Action::Push { name, registry: Some(to), how, .. } => {
            if !to.starts_with(registry::SCHEME) {
                return Err(Error::NoRegistry(to));
            }
            registry::push(&Store::open(dir)?, &name, &to, &how, format)?;
        }
        Action::Pull { name, how, to, .. } if name.starts_with(registry::SCHEME) => {
            registry::pull(&Store::create(dir)?, &name, to, &how, format)?;
        }
        Action::Push { name, to, peer, .. } => push::run(&Store::open(dir)?, &name, to, &peer.control, format)?,
        Action::Pull { name, to, peer, .. } => pull::run(&Store::create(dir)?, &name, to, &peer.control, format)?,
        Action::Gc { grace, remote: Remote { control: Some(endpoint) } } => {
            let session = session(endpoint)?;
            let swept = session.wait(session.client.collect_garbage(grace))?;
            local::print_swept(&swept, format)?;
        }
        Action::Gc { grace, .. } => local::gc(&Store::open(dir)?, Duration::from_secs(grace), format)?,
        Action::Verify { name, key } => {
            let store = Store::open(dir)?;
            if let (Some(name), Some(key)) = (&name, &key) {
                sign::verify(&store, name, key)?;
            }
            local::verify(&store, name, format)?;
        }
        Action::Sign { name, key, signature } => match (key, signature) {
            (Some(key), _) => sign::sign(&Store::open(dir)?, &name, &key)?,
            (None, Some(file)) => sign::attach(&Store::open(dir)?, &name, &file)?,
            // The command line asks for one of them.
            (None, None) => {}
        },
        Action::Capture { vm, name, keep_identity } => {
            capture::run(&Store::open(dir)?, &vm, &name, keep_identity, format)?;
        }
        Action::Export { name, file, part, format } => local::export(&Store::open(dir)?, &name, &part, file, format)?,
    }
    Ok(())
}

/// The control node at `endpoint`, else where the environment says, else here.
fn session(endpoint: Option<Endpoint>) -> Result<Session, Error> {
    let given = || std::env::var(CONTROL_VARIABLE).ok().filter(|text| !text.is_empty());
    let endpoint = match endpoint {
        Some(endpoint) => endpoint,
        None => given()
            .unwrap_or_else(|| DEFAULT_CONTROL.to_owned())
            .parse()
            .map_err(|e| control::Error::Variable { cause: e })?,
    };
    Ok(Session::open(&endpoint)?)
}

/// The tag to give to `digest`: `to`, else `name`, which must not be that digest, or its beginning, then.
fn tag_for(name: &str, to: Option<String>, digest: &Digest) -> Result<String, Error> {
    let is_digest = name.starts_with("blake3:") || name.len() >= 12 && digest.hex().starts_with(name);
    match to {
        Some(to) => Ok(to),
        None if is_digest => Err(Error::NameNeeded(name.to_owned())),
        None => Ok(name.to_owned()),
    }
}

/// Says what `name` pointed at when that was another image: nobody shall lose one without being told.
fn note_moved(name: &str, before: Option<Digest>, now: &Digest) {
    if let Some(before) = before.filter(|before| before != now) {
        output::note(&format!("{name} was {before} before"));
    }
}

/// Prints one image, after it was made or moved.
fn print_one(image: &bedplate_api::image::ImageSummary, format: Format) -> Result<(), PrintError> {
    match format {
        Format::Json => output::json(image),
        Format::Table => local::print(std::slice::from_ref(image), format, ""),
    }
}
