//! Registration: a machine introduces itself, gets its name and the network for its VMs.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use bedplate_api::control::NodeState;
use bedplate_api::node::{Ipv4Net, MAX_SLOTS, Register, Registered};

use super::accept;
use crate::control::{Control, now};
use crate::records::NodeRecord;
use crate::store::{Change, NODES, Read, StoreError};

/// Prefix length of one node's VM network: 253 guests, the bridge and two addresses that no host may have.
const NODE_PREFIX: u8 = 24;

/// Why a machine cannot be a node here.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// The request contradicts itself.
    #[error("registration refused: {0}")]
    Invalid(String),
    /// Every network is given to a node.
    #[error(
        "no network is left for the VMs of this node: {pool}/{prefix} has {count} of them; restart the control node with a larger --vm-network"
    )]
    NetworksUsedUp {
        /// Where networks come from.
        pool: Ipv4Addr,
        /// Its prefix length.
        prefix: u8,
        /// How many networks that makes.
        count: u32,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Takes a machine in, or takes it back.
pub async fn register(control: &Arc<Control>, request: Register) -> Result<Registered, RegisterError> {
    check(&request)?;
    let pool = control.options.vm_network;
    let status = request.status.clone();
    let shared = Arc::clone(control);
    let (record, network) = control
        .change(move |change| {
            let taken = take_in(change, request, pool)?;
            // Before anybody can see that it is ready: its earlier silence must not make it lost at once.
            shared.observed.heard(taken.0.number);
            Ok::<_, RegisterError>(taken)
        })
        .await?;
    accept(control, record.number, status).await?;
    control.wake_routes();
    let report_seconds = u32::try_from(control.options.lost_after / 5).unwrap_or(u32::MAX).clamp(1, 5);
    Ok(Registered { name: record.number.to_string(), vm_network: network, report_seconds })
}

fn check(request: &Register) -> Result<(), RegisterError> {
    let invalid = |what: String| Err(RegisterError::Invalid(what));
    if request.status.id != request.id {
        return invalid(format!("its id is {} and its report's id is {}", request.id, request.status.id));
    }
    if request.address.is_unspecified() || request.address.is_multicast() || request.port == 0 {
        return invalid(format!("nobody can reach an agent at {} port {}", request.address, request.port));
    }
    if request.status.capacity.slots > MAX_SLOTS {
        return invalid(format!("it offers {} slots; one node has {MAX_SLOTS} at most", request.status.capacity.slots));
    }
    match &request.mac {
        Some(mac) if !is_mac(mac) => invalid(format!("{mac:?} is not a MAC address in lower case with colons")),
        _ => Ok(()),
    }
}

/// Six lower-case hex bytes with colons.
pub fn is_mac(text: &str) -> bool {
    let hex = |part: &str| part.len() == 2 && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    text.split(':').count() == 6 && text.split(':').all(hex)
}

fn take_in(change: &Change, request: Register, pool: Ipv4Net) -> Result<(NodeRecord, Ipv4Net), RegisterError> {
    let (by_mac, by_id) = match &request.mac {
        Some(mac) => (change.node_by_mac(mac)?, change.node_by_id(request.id)?),
        None => (None, change.node_by_id(request.id)?),
    };
    let known = by_id.is_some();
    let mut record = match (by_id, by_mac) {
        (Some(record), Some(other)) if other.number != record.number => {
            give_up_mac(change, other)?;
            record
        }
        (Some(record), _) => record,
        // The machine that the boot service has seen under this MAC.
        (None, Some(record)) if record.id.is_none() => record,
        (None, other) => {
            if let Some(other) = other {
                give_up_mac(change, other)?;
            }
            change.new_node()?
        }
    };
    let network = match record.vm_network {
        Some(network) => network,
        None => free_network(&change.all(&NODES)?, pool)?,
    };
    let again = record.state == NodeState::Ready;
    record.id = Some(request.id);
    record.mac = request.mac.or(record.mac);
    record.endpoint = Some(SocketAddr::new(request.address, request.port));
    record.address = Some(request.address);
    record.vm_network = Some(network);
    record.state = NodeState::Ready;
    record.booting_since = None;
    let capacity = &request.status.capacity;
    let what = if known && again { "has registered again" } else { "has registered" };
    change.event(
        now(),
        record.number,
        format!(
            "{what} from {}: {} processors, {} MiB, {} slots join the free pool; its VMs live in {}/{}",
            request.address, capacity.cpus, capacity.memory_mib, capacity.slots, network.address, network.prefix
        ),
    )?;
    record.capacity = Some(request.status.capacity);
    change.put_node(&record)?;
    Ok((record, network))
}

/// The MAC now belongs to another machine: a network card was moved, or a board's id was rewritten.
fn give_up_mac(change: &Change, mut other: NodeRecord) -> Result<(), StoreError> {
    if other.id.is_none() {
        return change.remove_node(other.number);
    }
    other.mac = None;
    change.put_node(&other)
}

/// The lowest network of `pool` that no node has.
fn free_network(nodes: &[NodeRecord], pool: Ipv4Net) -> Result<Ipv4Net, RegisterError> {
    let taken: BTreeSet<Ipv4Addr> = nodes.iter().filter_map(|n| n.vm_network).map(|n| n.address).collect();
    let count = 1u32 << u32::from(NODE_PREFIX.saturating_sub(pool.prefix)).min(24);
    let base = u32::from(pool.address);
    // The first one is left out where there are others, so that node-1 has network 1.
    let networks = u32::from(count > 1)..count;
    networks
        .filter_map(|n| base.checked_add(n << (32 - NODE_PREFIX)).map(Ipv4Addr::from))
        .find(|address| !taken.contains(address))
        .map(|address| Ipv4Net { address, prefix: NODE_PREFIX.max(pool.prefix) })
        .ok_or(RegisterError::NetworksUsedUp { pool: pool.address, prefix: pool.prefix, count })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::NodeNumber;

    fn pool(prefix: u8) -> Ipv4Net {
        Ipv4Net { address: Ipv4Addr::new(10, 78, 0, 0), prefix }
    }

    #[test]
    fn networks_are_given_once_and_run_out_with_a_reason() {
        let mut nodes = Vec::new();
        for n in 1..=3u8 {
            let mut node = NodeRecord::new(NodeNumber(n.into()));
            let network = free_network(&nodes, pool(22)).unwrap();
            assert_eq!(network, Ipv4Net { address: Ipv4Addr::new(10, 78, n, 0), prefix: 24 });
            node.vm_network = Some(network);
            nodes.push(node);
        }
        assert!(free_network(&nodes, pool(22)).unwrap_err().to_string().contains("--vm-network"));
        nodes.remove(1);
        assert_eq!(free_network(&nodes, pool(22)).unwrap().address, Ipv4Addr::new(10, 78, 2, 0));
        assert_eq!(free_network(&[], pool(24)).unwrap().address, Ipv4Addr::new(10, 78, 0, 0));
    }

    #[test]
    fn macs_have_one_form() {
        assert!(is_mac("52:54:00:12:34:56"));
        for bad in ["", "52:54:00:12:34", "52-54-00-12-34-56", "52:54:00:12:34:5G", "52:54:00:12:34:AB", "5:2:5:4:0:0"]
        {
            assert!(!is_mac(bad), "{bad}");
        }
    }
}
