//! Which address a machine has: one for each MAC, for good, so that a machine keeps its address through firmware, iPXE
//! and its own system, and through restarts of the control node.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use super::dhcp::{Client, Server};
use crate::control::now;
use crate::records::{Lease, NodeRecord};
use crate::store::{Change, LEASES, Read, StoreError};

/// The first addresses are left for machines that people set up by hand.
const FIRST_HOST: u32 = 10;

/// The machine that boots from `mac`, and its address. A machine is remembered from its first network boot on; anything
/// else on the network is no business of ours and gets `None`.
pub fn lease(
    change: &Change,
    server: &Server,
    mac: &str,
    client: Client,
) -> Result<Option<(NodeRecord, Ipv4Addr)>, StoreError> {
    let known = change.node_by_mac(mac)?;
    if known.is_none() && client == Client::Plain {
        return Ok(None);
    }
    let address = match change.one(&LEASES, mac)? {
        Some(lease) => lease.address,
        None => match free(&change.all(&LEASES)?, server) {
            Some(address) => address,
            None => {
                tracing::error!(
                    "no address is left in the provisioning network for {mac}: give a larger --node-network"
                );
                return Ok(None);
            }
        },
    };
    change.put_lease(&Lease { mac: mac.to_owned(), address })?;
    let mut node = match known {
        Some(node) => node,
        None => {
            let node = change.new_node()?;
            change.event(now(), node.number, format!("a machine with the MAC {mac} asks to be booted"))?;
            node
        }
    };
    node.mac = Some(mac.to_owned());
    node.address = node.address.or(Some(address.into()));
    change.put_node(&node)?;
    Ok(Some((node, address)))
}

fn free(leases: &[Lease], server: &Server) -> Option<Ipv4Addr> {
    let taken: BTreeSet<Ipv4Addr> = leases.iter().map(|lease| lease.address).chain([server.address]).collect();
    let base = u32::from(server.network.address);
    let size = 1u32.checked_shl(32 - u32::from(server.network.prefix))?;
    // The last address is that of all hosts.
    (FIRST_HOST..size - 1).map(|n| Ipv4Addr::from(base + n)).find(|address| !taken.contains(address))
}
