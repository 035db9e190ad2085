//! What the repository serves: manifests, chunk indexes, chunks, and names for them.
//!
//! | method and path | body → answer | who |
//! | --- | --- | --- |
//! | `GET /v1/images` | → `[ImageSummary]` | people |
//! | `GET /v1/images/{name}` | → `ImageSummary`; the name is a tag or a digest | all |
//! | `PUT /v1/images/{name}` | `Tag` → `ImageSummary`; the manifest and all it names must be there | people |
//! | `DELETE /v1/images/{name}` | → 204; removes the name, not the content | people |
//! | `GET /v1/signatures/{digest}` | → the minisign signature of a manifest, as text; 404 where it has none | all |
//! | `GET /v1/orders/{digest}` | → [`BootOrder`] of an image; empty where nothing is known | nodes |
//! | `PUT /v1/orders/{digest}` | [`BootOrder`] → 204; what the image does not have is left out | nodes |
//! | `GET /v1/blobs/{digest}` | → the bytes of a manifest or an index | nodes |
//! | `PUT /v1/blobs/{digest}` | bytes → 204; refused when the digest does not match | people |
//! | `POST /v1/chunks/fetch` | `ChunkList` → frames (see [`FRAME_HEADER_LEN`]) in the order asked, as they are stored: who gets them verifies them | all |
//! | `POST /v1/chunks/check` | `ChunkList` → 204 when each is there and whole; sent by who got one that is not | all |
//! | `POST /v1/chunks/locate` | [`Locate`] → [`Located`]: which of its peers a node asks first | nodes |
//! | `POST /v1/chunks/missing` | `ChunkList` → `ChunkList` of those that are not there | people |
//! | `POST /v1/gc` | `Sweep` → `Swept`; removes what no name, no tier and no VM needs | people |
//! | `POST /v1/chunks` | frames → 204; every chunk is verified before it is kept | people |

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::{Digest, NodeId};

/// Most digests that one [`ChunkList`] may hold.
pub const MAX_CHUNK_LIST: usize = 256;

/// A frame on the wire is the 32 bytes of the chunk's digest, a little-endian `u32` with the length of what follows, and
/// the chunk as stored: one compressed frame, whose decompressed bytes have that digest.
pub const FRAME_HEADER_LEN: usize = 36;

/// Most bytes of a compressed chunk: 64 KiB of incompressible data and what the compressed format adds, with room.
pub const MAX_FRAME_LEN: usize = 80 * 1024;

/// Most bytes of a manifest or an index: the index of a part of 128 TiB is larger, but a body has to fit into memory.
pub const MAX_BLOB_LEN: usize = 512 * 1024 * 1024;

/// Most bytes of a signature with its comments.
pub const MAX_SIGNATURE_LEN: usize = 4096;

/// Most chunks of a [`BootOrder`]: 1 GiB, more than a boot reads.
pub const MAX_BOOT_ORDER: usize = 16 << 10;

/// What an image is an image of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageKind {
    /// A hypervisor: boots a blank machine into a node.
    Vmm,
    /// A guest's disk.
    Disk,
    /// A guest that stands still: its memory, the state of its machine, and its disk as it was then.
    Suspended,
}

/// An immutable description of an image; its digest is the image's name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format; 1 today. Readers refuse what they do not know.
    pub schema: u32,
    /// What it is an image of.
    pub kind: ImageKind,
    /// The address spaces that make up the image, by name: a disk image has `disk`, and `kernel` and `initrd` where they
    /// were found inside it; a VMM image has `kernel` and `initrd`.
    pub parts: BTreeMap<String, Part>,
    /// How to start it without a boot loader; absent when no kernel was found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootData>,
    /// Which firmware starts the disk's own boot loader. Looked for, and present, only where `boot` is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<Firmware>,
    /// Where it comes from, if it was captured from a VM's disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// Free text by key, for people: what was imported, from where, by which version.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// What a captured image was made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// The image that the VM's disk was a child of. It need not be there any more: nothing is read from it.
    pub parent: Digest,
    /// Name of the VM, or of the disk's directory.
    pub captured_from: String,
    /// The guest's file systems were written out and held still for it. Otherwise they are as after a power cut.
    pub at_rest: bool,
    /// What is in it that belongs to that one machine; empty where all that is known of was removed. Absent where nobody
    /// could look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unique: Option<BTreeSet<TraceKind>>,
}

/// One address space made of chunks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Length in bytes; the last chunk may be short.
    pub size: u64,
    /// The index blob: from chunk number to chunk digest.
    pub index: Digest,
    /// Bytes of distinct non-zero chunks before compression; what a copy to an empty node has to move, at most.
    pub content: u64,
}

/// Direct boot: which parts to load, and the kernel's command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootData {
    /// Name of the part with the kernel (bzImage or ELF).
    pub kernel: String,
    /// Name of the part with the initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<String>,
    /// Command line as found in the image; consoles and the like are added by whoever boots it.
    pub cmdline: String,
}

/// The firmware that a disk's own boot loader was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Firmware {
    /// Code in the disk's first sector.
    Bios,
    /// An EFI system partition.
    Uefi,
    /// The disk has both.
    Either,
}

/// Something in a disk that belongs to the one machine that ran from it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trace {
    /// What it is.
    pub kind: TraceKind,
    /// Its file as that machine calls it, for example `/etc/machine-id`. Bytes that are no plain text are escaped.
    pub path: String,
}

/// What belongs to one machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TraceKind {
    /// The number by which systemd and D-Bus know the machine.
    MachineId,
    /// A key by which an SSH server proves who it is.
    HostKey,
    /// An address that a DHCP server gave, or what a DHCP client calls itself.
    Lease,
    /// A log, or the dump of a crashed process.
    Log,
    /// What cloud-init remembers of the machine that it set up.
    CloudInit,
    /// Randomness that was kept for the next boot, or a secret that was made of it.
    Seed,
    /// What somebody typed or looked at.
    History,
}

/// A name and what it points to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSummary {
    /// The tag, for example `web`.
    pub name: String,
    /// Digest of the manifest.
    pub digest: Digest,
    /// What it is an image of.
    pub kind: ImageKind,
    /// Size that a guest sees (of the part `disk`), or the sum of the parts of a VMM image, in bytes.
    pub size: u64,
    /// Sum of the parts' `content`, in bytes.
    pub content: u64,
    /// It can be started without a boot loader.
    pub direct_boot: bool,
    /// It can not, and has a boot loader for this firmware.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<Firmware>,
}

/// What a tag shall point to.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tag {
    /// Digest of a manifest in the repository.
    pub digest: Digest,
    /// minisign signature of that manifest, to be kept with it; without it, what is kept stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signature: Option<String>,
}

/// Asks for garbage collection.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sweep {
    /// What is younger stays, in seconds: it may belong to an upload under way.
    pub grace_seconds: u64,
}

/// What a garbage collection took out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Swept {
    /// Manifests, indexes and chunks.
    pub removed: u64,
    /// What they and the drafts of processes that died took.
    pub bytes: u64,
}

/// Digests of chunks, [`MAX_CHUNK_LIST`] at most.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChunkList {
    /// In any order; each answer keeps it.
    pub digests: Vec<Digest>,
}

/// A node is about to get chunks of an image, and asks who else has them. From then on it counts as one who has.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Locate {
    /// Who asks.
    pub node: NodeId,
    /// The image that the chunks are of.
    pub image: Digest,
    /// [`MAX_CHUNK_LIST`] at most.
    pub digests: Vec<Digest>,
}

/// Whom to ask. What is in no list, and what a peer does not send, is had from the repository.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Located {
    /// Each once.
    pub peers: Vec<PeerChunks>,
}

/// Chunks that a node has, or is getting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerChunks {
    /// Where its agent serves.
    pub address: SocketAddr,
    /// Some of those that were asked for.
    pub digests: Vec<Digest>,
}

/// In which order a boot reads the chunks of an image's disk. A hint, learned from earlier boots: who copies the image
/// begins with these.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootOrder {
    /// Numbers of chunks, [`MAX_BOOT_ORDER`] at most.
    pub chunks: Vec<u64>,
}
