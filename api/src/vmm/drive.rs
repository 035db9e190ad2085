//! Disks.

use serde::{Deserialize, Serialize};

use super::{ChunkSource, RateLimiter};

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Name, unique among the drives; the guest sees its first 20 bytes as the serial number.
    pub drive_id: String,
    /// A raw image file, a block device, or the directory of a copy-on-write disk. Absent: there is a `socket`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<String>,
    /// The guest mounts this one as `/`: it becomes the first disk and `root=` is added to the command line.
    pub is_root_device: bool,
    /// Partition to mount as `/`, where `is_root_device`. Absent: the whole disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partuuid: Option<String>,
    /// The guest cannot write. Absent: it can, unless a backend does not let it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub is_read_only: Option<bool>,
    /// Whether a flush of the guest reaches the host's disk.
    #[serde(default)]
    pub cache_type: CacheType,
    /// The way to a raw file or block device. Absent: `Sync`. A copy-on-write disk has one way of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_engine: Option<IoEngine>,
    /// How much may be read and written in a time. Absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    /// Who gets what the image of a copy-on-write disk lacks. Absent: nobody, and a read of it fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunk_source: Option<ChunkSource>,
    /// Unix socket of a vhost-user backend that has the disk. Excludes all that says how a file is used: `path_on_host`,
    /// `is_read_only`, `rate_limiter`, `io_engine`, `chunk_source`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
}

/// A change of a drive of a VM that runs. Of one with a `socket` it has no other field, and has the backend asked for the
/// disk's size again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrivePatch {
    /// As in the path.
    pub drive_id: String,
    /// What holds the disk from now on; the same path has its size read again. Absent: as it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<String>,
    /// How much may be read and written from now on; of the limits only those change that are named. Absent: as it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// What a flush does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum CacheType {
    /// Flushes are answered without flushing: fast, and data is lost when the host fails.
    Unsafe,
    /// Flushes are honoured. Firecracker's default is `Unsafe`; ours is this one.
    #[default]
    Writeback,
}

/// How requests reach a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// One system call for each.
    Sync,
    /// io_uring, in batches. Where the host has none, as `Sync`, with a warning.
    Async,
}
