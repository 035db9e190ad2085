//! A door for a person: a port of 127.0.0.1 that leads to an address inside a private network.

use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::network::Door;
use crate::{Error, Network, Result};

/// How long a connection inside may take to come about.
const CONNECT: Duration = Duration::from_secs(10);

/// Passes TCP connections on until dropped; those that are open then go on until one side closes.
#[derive(Debug)]
pub struct Forward {
    address: SocketAddr,
    closing: Arc<AtomicBool>,
}

impl Forward {
    /// Listens on a free port of 127.0.0.1 and passes each connection on to `to` inside `network`.
    pub fn new(network: &Network, to: SocketAddr) -> Result<Self> {
        let failed = |source| Error::io("listen on 127.0.0.1", source);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let closing = Arc::new(AtomicBool::new(false));
        let (door, theirs) = (network.door(), Arc::clone(&closing));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                if theirs.load(Ordering::Relaxed) {
                    return;
                }
                if let Ok(client) = client {
                    let door = door.clone();
                    std::thread::spawn(move || pass(&client, &door, to));
                }
            }
        });
        Ok(Self { address, closing })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
        // Wakes the listening thread, which then sees that it shall close.
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_secs(1));
    }
}

/// Copies both ways until both sides have closed. A failure to connect closes the client, which is its answer.
fn pass(client: &TcpStream, door: &Door, to: SocketAddr) {
    let Ok(server) = door.inside(move || TcpStream::connect_timeout(&to, CONNECT)) else { return };
    std::thread::scope(|scope| {
        scope.spawn(|| copy(client, &server));
        copy(&server, client);
    });
}

fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn a_connection_from_outside_reaches_a_server_inside() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: network namespaces need root");
            return;
        }
        let network = Network::new(Ipv4Addr::new(10, 99, 1, 1), 24).unwrap();
        let listener = network.inside(|| TcpListener::bind("10.99.1.1:80")).unwrap();
        let server = std::thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            let mut said = String::new();
            client.read_to_string(&mut said).unwrap();
            client.write_all(said.to_uppercase().as_bytes()).unwrap();
        });
        let forward = Forward::new(&network, "10.99.1.1:80".parse().unwrap()).unwrap();
        let mut client = TcpStream::connect(forward.address()).unwrap();
        client.write_all(b"hello").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "HELLO");
        server.join().unwrap();
    }
}
