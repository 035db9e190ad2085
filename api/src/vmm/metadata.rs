//! The metadata service of Firecracker, MMDS: what the guest can ask for over HTTP on a link-local address.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// How the guest reaches its metadata.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MmdsConfig {
    /// Whether the guest needs a token.
    #[serde(default)]
    pub version: MmdsVersion,
    /// `iface_id` of every interface over which it may ask. They must be there already.
    pub network_interfaces: Vec<String>,
    /// A link-local address. Absent: 169.254.169.254.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4_address: Option<Ipv4Addr>,
    /// Answer as EC2's service does, in plain text, whatever the guest accepts.
    #[serde(default)]
    pub imds_compat: bool,
}

/// Versions of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum MmdsVersion {
    /// Any `GET` is answered.
    #[default]
    V1,
    /// A `GET` needs a token that a `PUT` has fetched.
    V2,
}
