//! Forwarding on the provisioning interface: VMs of one node reach those of another through this machine.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use futures_util::TryStreamExt;
use rtnetlink::Handle;

use crate::control::Control;

/// What has to be undone at the end.
pub(super) struct Forwarding {
    /// The kernel's switch, where it was off before.
    switched: Option<PathBuf>,
}

impl Forwarding {
    /// Switches forwarding on; that it cannot be is an event.
    pub async fn enable(control: &Arc<Control>, handle: &Handle) -> Self {
        let interface = match &control.options.netboot {
            Some(interface) => Some(interface.clone()),
            None => interface_of(handle, control.options.node_listen.map(|a| a.ip())).await,
        };
        let Some(interface) = interface else { return Self { switched: None } };
        let path = PathBuf::from(format!("/proc/sys/net/ipv4/conf/{interface}/forwarding"));
        let switch = || -> std::io::Result<bool> {
            let was_off = fs::read_to_string(&path)?.trim() == "0";
            if was_off {
                fs::write(&path, "1")?;
            }
            Ok(was_off)
        };
        match switch() {
            Ok(was_off) => Self { switched: was_off.then_some(path) },
            Err(error) => {
                let message = format!(
                    "VMs of different nodes cannot reach each other: cannot write {} ({error})",
                    path.display()
                );
                control.event("network", message).await;
                Self { switched: None }
            }
        }
    }

    /// As it was before.
    pub fn restore(self) {
        if let Some(path) = self.switched
            && let Err(error) = fs::write(&path, "0")
        {
            tracing::debug!("{} stays on: {error}", path.display());
        }
    }
}

/// The interface that has `address`.
async fn interface_of(handle: &Handle, address: Option<IpAddr>) -> Option<String> {
    let address = address.filter(|a| !a.is_unspecified())?;
    let found = handle.address().get().set_address_filter(address).execute().try_next().await.ok()??;
    let link = handle.link().get().match_index(found.header.index).execute().try_next().await.ok()??;
    link.attributes.into_iter().find_map(|attribute| match attribute {
        rtnetlink::packet_route::link::LinkAttribute::IfName(name) => Some(name),
        _ => None,
    })
}
