//! Network interfaces, and over which of them the guest reaches its metadata.

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use bedplate_api::vmm::{MmdsConfig, NetworkInterface, VmConfig};
use bedplate_devices::virtio::limiter::LimiterConfig;
use bedplate_devices::virtio::net::MAX_PAIRS;

use super::{ConfigError, distinct, limits, name, path};

/// Where the guest's metadata is if nobody says where.
pub const MMDS_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The least that IPv4 can do with (RFC 791).
pub(super) const MIN_MTU: u16 = 68;

/// One network interface.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct NetConfig {
    pub id: String,
    pub link: NetLink,
    pub mac: [u8; 6],
    pub mtu: Option<u16>,
    /// Where the guest reaches its metadata over it.
    pub metadata: Option<Ipv4Addr>,
    pub rx_limits: LimiterConfig,
    pub tx_limits: LimiterConfig,
    /// Pairs of queues that it must have; as many as fit, if nobody says how many.
    pub queue_pairs: Option<usize>,
    /// Over vhost-net: no limits, no metadata.
    pub vhost: bool,
}

/// What carries the frames of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NetLink {
    /// A tap device, by name.
    Tap(String),
    /// The vhost-user backend at this socket: no limits, no metadata.
    Backend(PathBuf),
}

/// Checks the network interfaces of `spec`, and says which of them lead to the guest's metadata.
///
/// # Errors
/// One cannot be, or two have the same name, tap or MAC address.
pub fn nets(spec: &VmConfig) -> Result<Vec<NetConfig>, ConfigError> {
    let interfaces = &spec.network_interfaces;
    apart(interfaces)?;
    let mut nets: Vec<_> = interfaces.iter().map(net).collect::<Result<_, _>>()?;
    if let Some(mmds) = &spec.mmds_config {
        let address = mmds.ipv4_address.unwrap_or(MMDS_ADDRESS);
        without_vhost(mmds, interfaces)?;
        let named = nets.iter_mut().filter(|net| mmds.network_interfaces.contains(&net.id));
        named.for_each(|net| net.metadata = Some(address));
    }
    Ok(nets)
}

/// Checks that no interface has what another one has.
///
/// # Errors
/// Two have the same name, tap or MAC address.
pub fn apart(interfaces: &[NetworkInterface]) -> Result<(), ConfigError> {
    distinct("iface_id", interfaces.iter().map(|n| n.iface_id.as_str()))?;
    distinct("host_dev_name", interfaces.iter().filter_map(|n| n.host_dev_name.as_deref()))?;
    let mut macs = HashSet::new();
    let taken =
        interfaces.iter().filter_map(|n| n.guest_mac.as_ref()).find(|mac| !macs.insert(mac.to_ascii_lowercase()));
    taken.map_or(Ok(()), |mac| Err(ConfigError::MacInUse(mac.clone())))
}

/// Checks one network interface.
///
/// # Errors
/// Its name, tap or MAC address cannot be.
pub fn net(net: &NetworkInterface) -> Result<NetConfig, ConfigError> {
    let id = name("iface_id", &net.iface_id)?;
    let (link, name) = match (&net.host_dev_name, &net.socket) {
        (Some(tap), None) => (NetLink::Tap(tap_name(&id, tap)?), tap),
        (None, Some(socket)) => (NetLink::Backend(path(&format!("network interface {id:?}: socket"), socket)?), socket),
        _ => return Err(ConfigError::OneLink(id)),
    };
    let mac = match &net.guest_mac {
        Some(text) => parse_mac(text).ok_or_else(|| ConfigError::Mac { id: id.clone(), mac: text.clone() })?,
        None => mac_of(name),
    };
    if let Some(mtu) = net.mtu.filter(|mtu| *mtu < MIN_MTU) {
        return Err(ConfigError::Mtu { id, mtu });
    }
    let queue_pairs = net.queue_pairs.map(usize::from);
    if let Some(pairs) = queue_pairs.filter(|pairs| !(1..=MAX_PAIRS).contains(pairs)) {
        return Err(ConfigError::QueuePairs { id, pairs });
    }
    let has_limits = net.rx_rate_limiter.is_some() || net.tx_rate_limiter.is_some();
    if net.vhost && has_limits {
        return Err(ConfigError::VhostLimits(id));
    }
    if net.socket.is_some() && (net.vhost || has_limits) {
        return Err(ConfigError::SocketExcludes { id, what: if net.vhost { "vhost" } else { "rate limiters" } });
    }
    let (rx_limits, tx_limits) = (limits(net.rx_rate_limiter), limits(net.tx_rate_limiter));
    Ok(NetConfig { id, link, mac, mtu: net.mtu, metadata: None, rx_limits, tx_limits, queue_pairs, vhost: net.vhost })
}

/// Checks how the guest reaches its metadata; returns at which address.
///
/// # Errors
/// No interface is named, or one that is not there, or the address is none that only a link has.
pub fn mmds_address(mmds: &MmdsConfig, interfaces: &[NetworkInterface]) -> Result<Ipv4Addr, ConfigError> {
    if mmds.network_interfaces.is_empty() {
        return Err(ConfigError::MmdsNowhere);
    }
    let known = |id: &&String| interfaces.iter().any(|interface| interface.iface_id == **id);
    if let Some(id) = mmds.network_interfaces.iter().find(|id| !known(id)) {
        return Err(ConfigError::MmdsInterface(id.clone()));
    }
    without_vhost(mmds, interfaces)?;
    let address = mmds.ipv4_address.unwrap_or(MMDS_ADDRESS);
    // The first and the last 256 are reserved (RFC 3927, 2.1).
    let usable = address.is_link_local() && (1..=254).contains(&address.octets()[2]);
    if usable { Ok(address) } else { Err(ConfigError::MmdsAddress(address)) }
}

/// Nobody of ours sees the frames that the kernel carries.
fn without_vhost(mmds: &MmdsConfig, interfaces: &[NetworkInterface]) -> Result<(), ConfigError> {
    let mut named = interfaces.iter().filter(|interface| mmds.network_interfaces.contains(&interface.iface_id));
    match named.find(|interface| interface.vhost || interface.socket.is_some()) {
        Some(interface) => Err(ConfigError::VhostMmds(interface.iface_id.clone())),
        None => Ok(()),
    }
}

/// As the kernel has it: IFNAMSIZ with its terminator.
fn tap_name(id: &str, tap: &str) -> Result<String, ConfigError> {
    let is_bad = tap.is_empty() || tap.len() > 15 || tap.contains(|c: char| c == '/' || c.is_whitespace() || c == '\0');
    if is_bad { Err(ConfigError::Tap { id: id.into(), name: tap.into() }) } else { Ok(tap.into()) }
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    // The lowest bit of the first byte marks groups.
    (parts.next().is_none() && mac[0] & 1 == 0 && mac != [0; 6]).then_some(mac)
}

/// A locally administered address that stays the same for the same tap or socket (FNV-1a of its name).
fn mac_of(name: &str) -> [u8; 6] {
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let [a, b, c, d, e, ..] = hash.to_le_bytes();
    [0x06, a, b, c, d, e]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_without_mac_gets_one_that_is_local_and_stays() {
        let interface = |tap: &str| NetworkInterface {
            iface_id: "e".into(),
            host_dev_name: Some(tap.into()),
            socket: None,
            guest_mac: None,
            mtu: None,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
            queue_pairs: None,
            vhost: false,
        };
        let mac = net(&interface("tap0")).unwrap().mac;
        assert_eq!(mac[0] & 3, 2);
        assert_eq!(net(&interface("tap0")).unwrap().mac, mac);
        assert_ne!(net(&interface("tap1")).unwrap().mac, mac);
    }

    #[test]
    fn pairs_of_queues_are_1_to_8_or_left_to_the_tap() {
        for (pairs, expected) in [("1", Some(1)), ("8", Some(8)), ("null", None)] {
            let text = format!(r#"{{"iface_id": "a", "host_dev_name": "t0", "queue_pairs": {pairs}}}"#);
            assert_eq!(net(&serde_json::from_str(&text).unwrap()).unwrap().queue_pairs, expected);
        }
        for pairs in ["0", "9", "255"] {
            let text = format!(r#"{{"iface_id": "a", "host_dev_name": "t0", "queue_pairs": {pairs}}}"#);
            let error = net(&serde_json::from_str(&text).unwrap()).unwrap_err().to_string();
            assert!(error.contains(&format!("\"a\": queue_pairs {pairs}")), "{error}");
        }
    }

    #[test]
    fn what_the_kernel_carries_has_no_limits_and_no_metadata() {
        let limited = r#"{"iface_id": "a", "host_dev_name": "t0", "vhost": true, "tx_rate_limiter": {}}"#;
        let error = net(&serde_json::from_str(limited).unwrap()).unwrap_err().to_string();
        assert!(error.contains("\"a\": vhost and rate limiters"), "{error}");
        let text = r#"{"network-interfaces": [{"iface_id": "a", "host_dev_name": "t0", "vhost": true},
                                              {"iface_id": "b", "host_dev_name": "t1"}],
                       "mmds-config": {"network_interfaces": ["a", "b"]}}"#;
        let spec: VmConfig = serde_json::from_str(text).unwrap();
        let error = nets(&spec).unwrap_err().to_string();
        assert!(error.contains("\"a\"") && error.contains("vhost"), "{error}");
        assert!(mmds_address(spec.mmds_config.as_ref().unwrap(), &spec.network_interfaces).is_err());
        let only = MmdsConfig { network_interfaces: vec!["b".into()], ..spec.mmds_config.clone().unwrap() };
        let checked = nets(&VmConfig { mmds_config: Some(only), ..spec }).unwrap();
        assert_eq!((checked[0].vhost, checked[0].metadata, checked[1].metadata.is_some()), (true, None, true));
    }

    #[test]
    fn an_interface_has_a_tap_or_a_backend_and_a_backend_does_it_alone() {
        let check = |more: &str| {
            let text = format!(r#"{{"iface_id": "a" {more}}}"#);
            net(&serde_json::from_str(&text).unwrap()).map_err(|error| error.to_string())
        };
        let config = check(r#", "socket": "/run/s", "queue_pairs": 2"#).unwrap();
        assert_eq!((config.link, config.queue_pairs), (NetLink::Backend("/run/s".into()), Some(2)));
        for wrong in ["", r#", "socket": "s", "host_dev_name": "t""#] {
            assert!(
                check(wrong).unwrap_err().contains("\"a\": name a tap device (host_dev_name) or the socket"),
                "{wrong}"
            );
        }
        assert!(check(r#", "socket": "s", "vhost": true"#).unwrap_err().contains("vhost and socket exclude"));
        assert!(check(r#", "socket": "s", "rx_rate_limiter": {}"#).unwrap_err().contains("rate limiters and socket"));
        let text = r#"{"network-interfaces": [{"iface_id": "a", "socket": "s"}],
                       "mmds-config": {"network_interfaces": ["a"]}}"#;
        assert!(nets(&serde_json::from_str(text).unwrap()).unwrap_err().to_string().contains("vhost or a socket"));
    }

    #[test]
    fn only_named_interfaces_lead_to_metadata_and_one_that_has_gone_is_no_obstacle() {
        let text = r#"{"network-interfaces": [{"iface_id": "a", "host_dev_name": "t0"},
                                              {"iface_id": "b", "host_dev_name": "t1"}],
                       "mmds-config": {"network_interfaces": ["gone", "b"], "ipv4_address": "169.254.7.7"}}"#;
        let nets = nets(&serde_json::from_str(text).unwrap()).unwrap();
        assert_eq!(nets.iter().map(|net| net.metadata).collect::<Vec<_>>(), [None, Some([169, 254, 7, 7].into())]);
    }
}
