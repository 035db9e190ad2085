//! Links, addresses and routes of the kernel, by rtnetlink. Every operation may be done twice.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use bedplate_api::node::Ipv4Net;
use futures_util::TryStreamExt;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::{Handle, LinkBridge, LinkUnspec, RouteMessageBuilder};

use crate::identity;

/// The kernel refused a change of the network.
#[derive(Debug, thiserror::Error)]
#[error("cannot {verb} {what}: {cause}")]
pub struct NetError {
    verb: &'static str,
    what: String,
    cause: String,
}

impl NetError {
    /// Could not `verb` the thing `what` for `cause`.
    pub fn new(verb: &'static str, what: impl ToString, cause: &impl ToString) -> Self {
        Self { verb, what: what.to_string(), cause: cause.to_string() }
    }

    fn netlink(verb: &'static str, what: impl ToString) -> impl FnOnce(rtnetlink::Error) -> Self {
        move |error| match errno(&error) {
            Some(code) => Self::new(verb, what, &io::Error::from_raw_os_error(code)),
            None => Self::new(verb, what, &error),
        }
    }
}

/// The error number in the kernel's refusal.
fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.code.map(|code| code.get().saturating_neg()),
        _ => None,
    }
}

/// That it is there already is what was wanted.
fn or_exists(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    result.or_else(|e| if errno(&e) == Some(libc::EEXIST) { Ok(()) } else { Err(e) })
}

/// That it is not there is what was wanted.
fn or_gone(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    let gone = [libc::ENODEV, libc::ESRCH, libc::EADDRNOTAVAIL];
    result.or_else(|e| if errno(&e).is_some_and(|code| gone.contains(&code)) { Ok(()) } else { Err(e) })
}

/// A network interface, as found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The kernel's number for it.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its MAC address, if it has one.
    pub mac: Option<[u8; 6]>,
    /// Loopback.
    pub loopback: bool,
    /// A cable is in it, as far as one can tell.
    pub running: bool,
}

impl Link {
    fn from_message(message: &LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            mac: None,
            loopback: message.header.flags.contains(LinkFlags::Loopback),
            running: message.header.flags.contains(LinkFlags::Running),
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Address(mac) => link.mac = mac.as_slice().try_into().ok(),
                _ => {}
            }
        }
        link
    }
}

/// A connection to the kernel's routing subsystem, in the network namespace in which it was opened.
#[derive(Debug, Clone)]
pub struct Links(Handle);

impl Links {
    /// Opens a connection, driven by a task of the current runtime.
    ///
    /// # Errors
    /// The kernel gives no socket.
    pub fn open() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self(handle))
    }

    /// Every link.
    ///
    /// # Errors
    /// See [`NetError`].
    pub async fn all(&self) -> Result<Vec<Link>, NetError> {
        let messages = self.0.link().get().execute().try_collect::<Vec<_>>().await;
        Ok(messages.map_err(NetError::netlink("list", "network interfaces"))?.iter().map(Link::from_message).collect())
    }

    /// The link called `name`, if there is one.
    ///
    /// # Errors
    /// See [`NetError`].
    pub async fn find(&self, name: &str) -> Result<Option<Link>, NetError> {
        match self.0.link().get().match_name(name).execute().try_next().await {
            Ok(message) => Ok(message.as_ref().map(Link::from_message)),
            Err(e) if errno(&e) == Some(libc::ENODEV) => Ok(None),
            Err(e) => Err(NetError::netlink("look for", name)(e)),
        }
    }

    /// Brings a link up.
    ///
    /// # Errors
    /// See [`NetError`].
    pub async fn up(&self, link: &Link) -> Result<(), NetError> {
        let message = LinkUnspec::new_with_index(link.index).up().build();
        self.0.link().set(message).execute().await.map_err(NetError::netlink("bring up", &link.name))
    }

    /// Makes the bridge `name` with the MAC address `mac`, or takes the one that is there, and brings it up. A bridge
    /// without an address of its own takes that of a port, and changes it as ports come and go under its guests' feet.
    ///
    /// # Errors
    /// See [`NetError`].
    pub async fn bridge(&self, name: &str, mac: [u8; 6]) -> Result<Link, NetError> {
        if self.find(name).await?.is_none() {
            let message = LinkBridge::new(name).address(mac.to_vec()).build();
            or_exists(self.0.link().add(message).execute().await).map_err(NetError::netlink("create bridge", name))?;
        }
        let link = self.find(name).await?.ok_or_else(|| NetError::new("use", name, &"it was removed at once"))?;
        self.up(&link).await?;
        Ok(link)
    }

    /// Makes `port` a port of the bridge, and brings it up.
    ///
    /// # Errors
    /// See [`NetError`].
    pub async fn join(&self, port: &Link, bridge: &Link) -> Result<(), NetError> {
        let message = LinkUnspec::new_with_index(port.index).controller(bridge.index).up().build();
        self.0.link().set(message).execute().await.map_err(NetError::netlink("add to the bridge", &port.name))
    }

    /// Removes the link called `name`.
    ///
    /// # Errors
    /// See [`NetError`].
    pub async fn remove(&self, name: &str) -> Result<(), NetError> {
        let Some(link) = self.find(name).await? else { return Ok(()) };
        or_gone(self.0.link().del(link.index).execute().await).map_err(NetError::netlink("remove", name))
    }

    /// The IPv4 addresses of a link.
    ///
    /// # Errors
    /// See [`NetError`].
    pub async fn addresses(&self, link: &Link) -> Result<Vec<Ipv4Net>, NetError> {
        let get = self.0.address().get().set_link_index_filter(link.index).execute();
        let messages = get.try_collect::<Vec<_>>().await.map_err(NetError::netlink("list addresses of", &link.name))?;
        let v4 = messages.iter().filter_map(|m| {
            let address = m.attributes.iter().find_map(|a| match a {
                AddressAttribute::Local(IpAddr::V4(v4)) => Some(*v4),
                _ => None,
            })?;
            Some(Ipv4Net { address, prefix: m.header.prefix_len })
        });
        Ok(v4.collect())
    }

    /// Lets `address` be the only IPv4 address of a link.
    ///
    /// # Errors
    /// See [`NetError`].
    pub async fn set_address(&self, link: &Link, address: Ipv4Net) -> Result<(), NetError> {
        let what = format!("address {}/{} of {}", address.address, address.prefix, link.name);
        let add = self.0.address().add(link.index, IpAddr::V4(address.address), address.prefix);
        or_exists(add.execute().await).map_err(NetError::netlink("set", &what))?;
        let get = self.0.address().get().set_link_index_filter(link.index).execute();
        let all = get.try_collect::<Vec<_>>().await.map_err(NetError::netlink("list addresses of", &link.name))?;
        for message in all {
            let other = message.attributes.iter().any(|a| match a {
                AddressAttribute::Local(IpAddr::V4(v4)) => {
                    *v4 != address.address || message.header.prefix_len != address.prefix
                }
                _ => false,
            });
            if other {
                or_gone(self.0.address().del(message).execute().await).map_err(NetError::netlink("replace", &what))?;
            }
        }
        Ok(())
    }

    /// Sends everything without a better route to `gateway`, on `link`.
    ///
    /// # Errors
    /// See [`NetError`].
    pub async fn set_default_route(&self, link: &Link, gateway: Ipv4Addr) -> Result<(), NetError> {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).output_interface(link.index).build();
        let add = self.0.route().add(route).replace().execute().await;
        or_exists(add).map_err(NetError::netlink("set the default route to", gateway))
    }

    /// Notes for good that `address` on `link` is at `mac`, so that nobody there can claim it.
    ///
    /// # Errors
    /// See [`NetError`].
    pub async fn set_neighbour(&self, link: &Link, address: Ipv4Addr, mac: [u8; 6]) -> Result<(), NetError> {
        let add = self.0.neighbours().add(link.index, IpAddr::V4(address)).link_layer_address(&mac).replace();
        add.execute().await.map_err(NetError::netlink("note the neighbour", address))
    }

    /// Forgets what [`Links::set_neighbour`] noted of `address`.
    ///
    /// # Errors
    /// See [`NetError`].
    pub async fn remove_neighbour(&self, link: &Link, address: Ipv4Addr) -> Result<(), NetError> {
        use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage};
        let mut message = NeighbourMessage::default();
        message.header.family = rtnetlink::packet_route::AddressFamily::Inet;
        message.header.ifindex = link.index;
        message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(address)));
        let gone = |e: rtnetlink::Error| {
            if matches!(errno(&e), Some(libc::ENOENT | libc::ENODEV)) { Ok(()) } else { Err(e) }
        };
        let removed = self.0.neighbours().del(message).execute().await.or_else(gone);
        removed.map_err(NetError::netlink("forget the neighbour", address))
    }
}

/// Lets packets that arrive on the interface `name` go on through another one.
///
/// # Errors
/// See [`NetError`].
pub fn forward_from(name: &str) -> Result<(), NetError> {
    let file = format!("/proc/sys/net/ipv4/conf/{name}/forwarding");
    fs::write(&file, "1").map_err(|e| NetError::new("write", &file, &e))
}

impl std::fmt::Display for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.name)?;
        self.mac.map_or(Ok(()), |mac| write!(f, " ({})", identity::format_mac(mac)))
    }
}
