//! Arithmetic of a node's VM network.

use std::net::Ipv4Addr;

use bedplate_api::node::Ipv4Net;

/// Text that is no usable network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a network for VMs: expected an address and a prefix length up to 30, such as 10.78.1.0/24")]
pub struct ParseNetError(String);

/// Reads `10.78.1.0/24`.
///
/// # Errors
/// See [`ParseNetError`].
pub fn parse(text: &str) -> Result<Ipv4Net, ParseNetError> {
    let bad = || ParseNetError(text.chars().take(40).collect());
    let (address, prefix) = text.split_once('/').ok_or_else(bad)?;
    let network = Ipv4Net { address: address.parse().map_err(|_| bad())?, prefix: prefix.parse().map_err(|_| bad())? };
    usable(network).then(|| base(network)).ok_or_else(bad)
}

/// Whether the network has room for the node and a VM.
pub const fn usable(network: Ipv4Net) -> bool {
    network.prefix >= 1 && network.prefix <= 30
}

/// The network with the bits of the host cleared.
pub fn base(network: Ipv4Net) -> Ipv4Net {
    let address = Ipv4Addr::from(u32::from(network.address) & mask_bits(network));
    Ipv4Net { address, ..network }
}

/// The network mask.
pub fn mask(network: Ipv4Net) -> Ipv4Addr {
    mask_bits(network).into()
}

fn mask_bits(network: Ipv4Net) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(network.prefix.min(32))).unwrap_or(0)
}

/// The broadcast address.
pub fn broadcast(network: Ipv4Net) -> Ipv4Addr {
    (u32::from(network.address) | !mask_bits(network)).into()
}

/// The bridge's address: the first one of a host.
pub fn gateway(network: Ipv4Net) -> Ipv4Addr {
    (u32::from(base(network).address) + 1).into()
}

/// Whether `address` can be a VM's.
pub fn is_for_vm(network: Ipv4Net, address: Ipv4Addr) -> bool {
    address > gateway(network) && address < broadcast(network)
}

/// The lowest address for a VM that `taken` does not hold.
pub fn allocate(network: Ipv4Net, taken: &[Ipv4Addr]) -> Option<Ipv4Addr> {
    let first = u32::from(gateway(network)).checked_add(1)?;
    (first..u32::from(broadcast(network))).map(Ipv4Addr::from).find(|a| !taken.contains(a))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_network_in_full() {
        let network = parse("10.78.1.5/29").unwrap();
        assert_eq!(network.address, Ipv4Addr::new(10, 78, 1, 0));
        assert_eq!(mask(network), Ipv4Addr::new(255, 255, 255, 248));
        assert_eq!(gateway(network), Ipv4Addr::new(10, 78, 1, 1));
        assert_eq!(broadcast(network), Ipv4Addr::new(10, 78, 1, 7));
        let mut taken = vec![];
        while let Some(address) = allocate(network, &taken) {
            assert!(is_for_vm(network, address));
            taken.push(address);
        }
        assert_eq!(taken.len(), 5, "{taken:?}");
        taken.remove(2);
        assert_eq!(allocate(network, &taken), Some(Ipv4Addr::new(10, 78, 1, 4)));
        assert!(!is_for_vm(network, gateway(network)) && !is_for_vm(network, Ipv4Addr::new(10, 78, 2, 3)));
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for bad in ["", "10.78.1.0", "10.78.1.0/31", "10.78.1.0/0", "10.78.1/24", "10.78.1.0/x", "10.78.1.0/24/1"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
