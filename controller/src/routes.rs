//! Routes to the nodes' VM networks, so that this machine, and through it the nodes, reach every VM. Level-triggered like
//! everything that acts: the routes that should be there are compared with those set by this process.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use bedplate_api::node::Ipv4Net;
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::{Handle, RouteMessageBuilder};
use tokio_util::sync::CancellationToken;

use crate::control::Control;
use crate::store::{NODES, Read};

mod forward;

/// A route that could not be set is tried again after this long.
const TICK: Duration = Duration::from_secs(10);

/// Network → gateway.
type Routes = BTreeMap<(Ipv4Addr, u8), Ipv4Addr>;

/// Keeps the routes until `stop`, then removes them. Does nothing where no node can be reached over a network.
pub async fn run(control: Arc<Control>, stop: CancellationToken) {
    let needed = control.options.node_listen.is_some_and(|address| !address.ip().is_loopback());
    let handle = match rtnetlink::new_connection() {
        Ok((connection, handle, _)) if needed => {
            tokio::spawn(connection);
            handle
        }
        outcome => {
            if let (Err(error), true) = (outcome, needed) {
                control.event("network", format!("no routes to VMs can be set: {error}")).await;
            }
            return stop.cancelled().await;
        }
    };
    let forwarding = forward::Forwarding::enable(&control, &handle).await;
    let mut set = Routes::new();
    let mut refused = Routes::new();
    loop {
        let wanted = wanted(&control).await;
        bring_about(&control, &handle, &wanted, &mut set, &mut refused).await;
        tokio::select! {
            () = stop.cancelled() => break,
            () = control.routes_woken() => {}
            () = tokio::time::sleep(TICK) => {}
        }
    }
    for (network, gateway) in set {
        if let Err(error) = handle.route().del(message(network, gateway)).execute().await {
            tracing::debug!("route to {}/{} is gone already: {error}", network.0, network.1);
        }
    }
    forwarding.restore();
}

async fn wanted(control: &Arc<Control>) -> Routes {
    let nodes = control.read(|snapshot| snapshot.all(&NODES)).await.unwrap_or_default();
    let route = |network: Ipv4Net, address: IpAddr| match address {
        IpAddr::V4(gateway) if !gateway.is_loopback() => Some(((network.address, network.prefix), gateway)),
        _ => None,
    };
    nodes.iter().filter_map(|node| route(node.vm_network?, node.address?)).collect()
}

async fn bring_about(control: &Arc<Control>, handle: &Handle, wanted: &Routes, set: &mut Routes, refused: &mut Routes) {
    for (network, gateway) in wanted {
        if set.get(network) == Some(gateway) {
            continue;
        }
        let ((address, prefix), route) = (network, message(*network, *gateway));
        match handle.route().add(route).replace().execute().await {
            Ok(()) => {
                set.insert(*network, *gateway);
                refused.remove(network);
            }
            // Said once, not at every try.
            Err(error) => {
                if refused.insert(*network, *gateway) != Some(*gateway) {
                    let message = format!(
                        "no route to the VMs in {address}/{prefix} through {gateway} ({error}): they cannot be reached \
                         from here; tried again"
                    );
                    control.event("network", message).await;
                }
            }
        }
    }
}

fn message((network, prefix): (Ipv4Addr, u8), gateway: Ipv4Addr) -> RouteMessage {
    RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(network, prefix).gateway(gateway).build()
}
