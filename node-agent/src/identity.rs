//! Who this node is: an id that stays for as long as the machine exists.

use std::fs;
use std::path::Path;

use bedplate_api::NodeId;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::files::{self, FileError};

/// The first bytes of an id derived from a MAC address; the variant and version bits are set on top.
const MAC_NAMESPACE: [u8; 10] = *b"bedplatmac";

/// `DIR/node.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeFile {
    id: NodeId,
}

/// This node's id: the one kept in `dir`, else the SMBIOS UUID if the firmware has a sane one, else one derived from
/// `mac`, else a random one. Kept in `dir` from then on.
///
/// # Errors
/// The file cannot be read or written.
pub fn load_or_make(dir: &Path, mac: Option<&str>) -> Result<NodeId, FileError> {
    let path = dir.join("node.json");
    if let Some(file) = files::read_json::<NodeFile>(&path)? {
        return Ok(file.id);
    }
    let smbios = fs::read_to_string("/sys/class/dmi/id/product_uuid").ok();
    let id = choose(smbios.as_deref(), mac);
    files::write_json(&path, &NodeFile { id })?;
    Ok(id)
}

fn choose(smbios: Option<&str>, mac: Option<&str>) -> NodeId {
    smbios
        .and_then(|s| s.trim().parse::<Uuid>().ok())
        .filter(is_sane)
        .or_else(|| mac.and_then(parse_mac).map(from_mac))
        .map_or_else(NodeId::random, NodeId::from_uuid)
}

/// Values of makers' templates, seen on boards whose firmware was never given a UUID of its own.
const TEMPLATES: [u128; 2] = [0x0300_0200_0400_0500_0006_0007_0008_0009, 0x0001_0203_0405_0607_0809_0a0b_0c0d_0e0f];

/// Firmware that was never given a UUID says all zeros, all ones or the like, or what stands in its maker's template.
fn is_sane(uuid: &Uuid) -> bool {
    let mut bytes = *uuid.as_bytes();
    bytes.sort_unstable();
    let distinct = 1 + bytes.windows(2).filter(|w| w[0] != w[1]).count();
    distinct > 4 && !TEMPLATES.contains(&uuid.as_u128())
}

fn from_mac(mac: [u8; 6]) -> Uuid {
    let mut bytes = [0; 16];
    bytes[..10].copy_from_slice(&MAC_NAMESPACE);
    bytes[10..].copy_from_slice(&mac);
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

/// Six pairs of hex digits with colons.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.trim().split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

/// The form that everything here writes: lower case with colons.
pub fn format_mac(mac: [u8; 6]) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_firmware_is_believed_only_where_it_is_sane() {
        let good = "4c4c4544-0047-3510-8052-b4c04f4a3132";
        assert_eq!(choose(Some(&format!("{good}\n")), None).to_string(), good);
        let from_mac = choose(None, Some("52:54:00:00:00:01"));
        assert!(from_mac.to_string().ends_with("525400000001"));
        for bad in [
            "00000000-0000-0000-0000-000000000000",
            "ffffffff-ffff-ffff-ffff-ffffffffffff",
            "Not Settable",
            "03000200-0400-0500-0006-000700080009",
            "00010203-0405-0607-0809-0a0b0c0d0e0f",
        ] {
            assert_eq!(choose(Some(bad), Some("52:54:00:00:00:01")), from_mac, "{bad}");
        }
        assert_ne!(choose(None, None), choose(None, None));
    }

    #[test]
    fn an_id_once_chosen_stays() {
        let dir = tempfile::tempdir().unwrap();
        let first = load_or_make(dir.path(), Some("52:54:00:00:00:01")).unwrap();
        assert_eq!(load_or_make(dir.path(), Some("52:54:00:00:00:02")).unwrap(), first);
    }

    #[test]
    fn macs_parse_in_one_form_only() {
        assert_eq!(parse_mac("52:54:00:AB:cd:01").map(format_mac).unwrap(), "52:54:00:ab:cd:01");
        for bad in
            ["", "52:54:00:ab:cd", "52:54:00:ab:cd:01:02", "5254:00:ab:cd:01", "52:54:00:ab:cd:0g", "+2:54:00:ab:cd:01"]
        {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }
}
