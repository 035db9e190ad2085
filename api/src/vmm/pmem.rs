//! Files of the host that the guest has in its address space.

use serde::{Deserialize, Serialize};

use super::RateLimiter;

/// One file, as persistent memory: the guest sees `/dev/pmem{N}`, which it can mount with `dax`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pmem {
    /// Name, unique among the pmem devices.
    pub id: String,
    /// A regular file that is not empty.
    pub path_on_host: String,
    /// The guest mounts this one as `/`: `root=` is added to the command line. No drive can be that, too.
    #[serde(default)]
    pub root_device: bool,
    /// The guest cannot change the file. Its writes have no effect, and it is not told: it should mount with `ro`.
    #[serde(default)]
    pub read_only: bool,
    /// How often the guest may flush: a request, and as many bytes as the file has. Absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}

/// A change of a pmem device of a VM that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemPatch {
    /// As in the path.
    pub id: String,
    /// How often the guest may flush from now on; of the limits only those change that are named. Absent: as it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
}
