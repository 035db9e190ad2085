//! A private network: a bridge in a network namespace of its own, with a tap device for each machine.
//!
//! Nothing of it is seen from outside the namespace; a [`crate::Forward`] lets a person in. Namespaces are named
//! `bp-{process id}-{number}`, so that those of a process that was killed are found and removed by the next one.

use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::process::output;
use crate::{Error, Result};

/// Where iproute2 keeps named namespaces.
const NAMED: &str = "/run/netns";
/// The bridge of every network.
pub const BRIDGE: &str = "br0";

/// A network namespace with one bridge. Removed on drop, with all that is in it.
#[derive(Debug)]
pub struct Network {
    name: String,
    namespace: Arc<File>,
    taps: AtomicU32,
}

impl Network {
    /// A namespace whose bridge has `address`/`prefix`. Needs root.
    pub fn new(address: Ipv4Addr, prefix: u8) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        remove_stale();
        let name = format!("bp-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        output(Command::new("ip").args(["netns", "add", &name]))?;
        let path = Path::new(NAMED).join(&name);
        let opened = File::open(&path).map_err(|source| Error::path("open", &path, source));
        // From here on dropping `network` removes the namespace, also when a step below fails.
        let network =
            Self { namespace: Arc::new(opened.inspect_err(|_| remove(&name))?), name, taps: AtomicU32::new(0) };
        network.ip(&["link", "set", "lo", "up"])?;
        network.ip(&["link", "add", BRIDGE, "type", "bridge", "stp_state", "0", "forward_delay", "0"])?;
        network.ip(&["addr", "add", &format!("{address}/{prefix}"), "dev", BRIDGE])?;
        network.ip(&["link", "set", BRIDGE, "up"])?;
        Ok(network)
    }

    /// Its name, for `ip netns exec`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Adds a tap device to the bridge, for one machine, and returns its name.
    pub fn add_tap(&self) -> Result<String> {
        let tap = format!("tap{}", self.taps.fetch_add(1, Ordering::Relaxed));
        self.ip(&["tuntap", "add", &tap, "mode", "tap"])?;
        self.ip(&["link", "set", &tap, "master", BRIDGE, "up"])?;
        Ok(tap)
    }

    /// Runs `ip` with these arguments inside.
    pub fn ip(&self, args: &[&str]) -> Result<String> {
        output(Command::new("ip").args(["-n", &self.name]).args(args))
    }

    /// Makes `command` run inside.
    pub fn enter(&self, command: &mut Command) {
        self.door().enter(command);
    }

    /// Runs `work` in a thread inside, so that the sockets it makes are inside; they stay so wherever they go.
    pub fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
        self.door().inside(work)
    }

    /// A TCP connection to an address inside, for a caller outside.
    pub fn connect(&self, to: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
        self.inside(move || TcpStream::connect_timeout(&to, timeout))
    }

    /// A way in that may outlive the network, and then leads nowhere.
    pub(crate) fn door(&self) -> Door {
        Door(Arc::clone(&self.namespace))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// See [`Network::door`].
#[derive(Debug, Clone)]
pub(crate) struct Door(Arc<File>);

impl Door {
    /// See [`Network::enter`].
    pub(crate) fn enter(&self, command: &mut Command) {
        let namespace = Arc::clone(&self.0);
        // SAFETY: between fork and exec one system call is made, on a descriptor that the closure owns.
        unsafe {
            command.pre_exec(move || Ok(join(&namespace)?));
        }
    }

    /// See [`Network::inside`].
    pub(crate) fn inside<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let namespace = Arc::clone(&self.0);
        let thread = std::thread::spawn(move || {
            join(&namespace)?;
            work()
        });
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread inside the network died")))
    }
}

/// Moves the calling thread into `namespace`.
fn join(namespace: &File) -> rustix::io::Result<()> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
}

/// Failing to remove leaves a name behind that the next start finds.
fn remove(name: &str) {
    let _ = output(Command::new("ip").args(["netns", "del", name]));
}

/// Removes the namespaces of processes that are gone.
fn remove_stale() {
    let Ok(entries) = fs::read_dir(NAMED) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if owner(&name).is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            remove(&name);
        }
    }
}

/// The process that a namespace of ours is named after.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix("bp-")?.split_once('-')?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_ours_have_an_owner() {
        assert_eq!(owner("bp-17-0"), Some(17));
        assert_eq!(owner("bp-x-0"), None);
        assert_eq!(owner("blue"), None);
    }

    /// Two networks with the same address do not meet, and nothing stays behind.
    #[test]
    fn a_network_is_private_and_goes_away() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: network namespaces need root");
            return;
        }
        let address = Ipv4Addr::new(10, 99, 0, 1);
        let first = Network::new(address, 24).unwrap();
        let second = Network::new(address, 24).unwrap();
        assert_eq!(first.add_tap().unwrap(), "tap0");
        assert_eq!(second.add_tap().unwrap(), "tap0");
        let mut command = Command::new("ip");
        first.enter(command.args(["-o", "addr", "show", BRIDGE]));
        assert!(output(&mut command).unwrap().contains("10.99.0.1/24"));
        let names = [first.name().to_owned(), second.name().to_owned()];
        drop((first, second));
        assert!(names.iter().all(|name| !Path::new(NAMED).join(name).exists()));
    }
}
