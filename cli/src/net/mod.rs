//! `bedplate run --net`: a private link between one guest and this host, and a way out for the guest.
//!
//! A tap device with the host's address on it, a table of address translation where `nft` is there, and a DHCP responder
//! that gives the guest its address. All of it belongs to one run and goes with it; only the switch that lets this host
//! forward packets stays on. Tools that every Debian has are run for it (`ip`, `nft`): this is set up once per VM, and
//! what they print is what a person would see.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};

use bedplate_lab::process::output as run;
use rustix::fs::{FlockOperation, flock};
use rustix::process::geteuid;

mod dhcp;

/// The third number of a run's addresses, 10.79.N.0/30.
const NUMBERS: std::ops::RangeInclusive<u8> = 1..=254;
const PREFIX: u8 = 30;
/// In the directory of a run that has a network.
const MARK: &str = "net";
/// What taps are made of. Two runs that begin at once must not pick one number, so they lock it meanwhile.
const TUN: &str = "/dev/net/tun";
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

/// A network that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Taps are root's.
    #[error("--net needs root, to make a tap device; run it with sudo, or without --net")]
    NotRoot,
    /// No taps here.
    #[error("{TUN} cannot be used ({0}): `modprobe tun` as root, or run without --net")]
    NoTun(io::Error),
    /// `ip` or `nft` said no.
    #[error("the guest's network cannot be made: {0}")]
    Command(#[from] bedplate_lab::Error),
    /// A file could not be used.
    #[error("the guest's network cannot be made: {path}: {source}")]
    File {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// All are taken.
    #[error("all {} networks from 10.79.1.0/30 on are in use; end some VMs", NUMBERS.len())]
    Full,
    /// The DHCP port.
    #[error(
        "no DHCP for the guest on {tap}: {source}; another DHCP server on this machine may have taken port 67 on all interfaces (dnsmasq needs --bind-dynamic)"
    )]
    Dhcp {
        /// The tap.
        tap: String,
        /// Why.
        source: io::Error,
    },
}

/// A guest's network; removed when dropped.
#[derive(Debug)]
pub struct Net {
    tap: String,
    /// The guest's address.
    pub guest: Ipv4Addr,
    /// The guest's MAC address: the same for each run of a VM of this name.
    pub mac: String,
    /// The guest can reach beyond this host.
    pub way_out: bool,
}

impl Net {
    /// Makes the network of this process's VM, called `name`, whose directory is `dir`, and starts to answer its DHCP
    /// requests.
    ///
    /// # Errors
    /// See [`NetError`]; what was made by then is removed.
    pub fn start(name: &str, dir: &Path) -> Result<Self, NetError> {
        if !geteuid().is_root() {
            return Err(NetError::NotRoot);
        }
        let _lock = lock()?;
        let number = free_number()?;
        let (host, guest) = (Ipv4Addr::new(10, 79, number, 1), Ipv4Addr::new(10, 79, number, 2));
        let tap = tap_of(std::process::id());
        // From here on whoever sweeps the directory of a killed run knows that there is more to remove.
        let mark = dir.join(MARK);
        fs::write(&mark, &tap).map_err(|source| NetError::File { path: mark.display().to_string(), source })?;
        // Of a process that had our number and was killed.
        remove(&tap);
        let mac = mac_of(name);
        // From here on dropping it removes what is there so far.
        let mut net = Self { tap: tap.clone(), guest, mac: text_of(mac), way_out: false };
        ip(&["tuntap", "add", "dev", &tap, "mode", "tap"])?;
        ip(&["addr", "add", &format!("{host}/{PREFIX}"), "dev", &tap])?;
        ip(&["link", "set", "dev", &tap, "up"])?;
        net.way_out = open_way_out(&tap, number)?;
        let offer = dhcp::Offer { host, guest, mac, name: name.to_owned(), dns: name_servers() };
        dhcp::serve(&tap, offer).map_err(|source| NetError::Dhcp { tap, source })?;
        Ok(net)
    }

    /// Name of the tap device.
    pub fn tap(&self) -> &str {
        &self.tap
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        remove(&self.tap);
    }
}

/// Removes the network of the run whose directory is `dir`, `{name}-{process id}`, and whose process is gone.
pub fn remove_stale(dir: &Path) {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let pid = name.rsplit_once('-').and_then(|(_, pid)| pid.parse().ok());
    if let (Some(pid), true) = (pid, dir.join(MARK).exists()) {
        remove(&tap_of(pid));
    }
}

/// A process has one VM. Interface names have at most 15 bytes, process ids at most 7 digits.
fn tap_of(pid: u32) -> String {
    format!("bprun{pid}")
}

fn table_of(tap: &str) -> String {
    format!("bedplate_{tap}")
}

/// Removes what there is of it; what is not there needs no removing. Nothing is looked up before: /sys may be that of
/// another network namespace.
fn remove(tap: &str) {
    let _ = ip(&["link", "del", "dev", tap]);
    let _ = run(Command::new("nft").args(["delete", "table", "ip", &table_of(tap)]));
}

fn ip(args: &[&str]) -> Result<String, bedplate_lab::Error> {
    run(Command::new("ip").args(args))
}

fn lock() -> Result<File, NetError> {
    let file = File::open(TUN).map_err(NetError::NoTun)?;
    flock(&file, FlockOperation::LockExclusive).map_err(|e| NetError::NoTun(e.into()))?;
    Ok(file)
}

fn free_number() -> Result<u8, NetError> {
    let taken = numbers_in(&ip(&["-4", "-o", "addr", "show"])?);
    NUMBERS.into_iter().find(|number| !taken.contains(number)).ok_or(NetError::Full)
}

fn numbers_in(addresses: &str) -> Vec<u8> {
    addresses
        .split_whitespace()
        .filter_map(|word| word.split_once('/')?.0.parse::<Ipv4Addr>().ok())
        .filter(|address| address.octets()[..2] == [10, 79])
        .map(|address| address.octets()[2])
        .collect()
}

/// Lets the guest reach what this host reaches, under the host's address. Without `nft` it reaches the host only.
fn open_way_out(tap: &str, number: u8) -> Result<bool, NetError> {
    let table = table_of(tap);
    let rules = format!(
        "table ip {table} {{
            chain out {{
                type nat hook postrouting priority 100; policy accept;
                ip saddr 10.79.{number}.0/{PREFIX} oifname != \"{tap}\" masquerade
            }}
        }}"
    );
    let mut nft = match Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn() {
        Ok(nft) => nft,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(NetError::File { path: "nft".to_owned(), source }),
    };
    let failed = |source| NetError::File { path: "nft".to_owned(), source };
    if let Some(mut stdin) = nft.stdin.take() {
        stdin.write_all(rules.as_bytes()).map_err(failed)?;
    }
    let out = nft.wait_with_output().map_err(failed)?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr).trim().to_owned();
        return Err(failed(io::Error::other(said)));
    }
    fs::write(FORWARDING, "1").map_err(|source| NetError::File { path: FORWARDING.to_owned(), source })?;
    Ok(true)
}

/// Name servers that a guest can reach too: not those that listen on this host's loopback only.
fn name_servers() -> Vec<Ipv4Addr> {
    // The second file is systemd-resolved's list of the real ones.
    ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"]
        .iter()
        .map(|path| servers_in(&fs::read_to_string(path).unwrap_or_default()))
        .find(|servers| !servers.is_empty())
        .unwrap_or_default()
}

fn servers_in(text: &str) -> Vec<Ipv4Addr> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver")?.trim().parse::<Ipv4Addr>().ok())
        .filter(|server| !server.is_loopback())
        .take(3)
        .collect()
}

/// Locally administered, from the VM's name.
fn mac_of(name: &str) -> [u8; 6] {
    let digest = bedplate_images::digest_of(name.as_bytes());
    let [a, b, c, d, e, ..] = *digest.as_bytes();
    [0x02, a, b, c, d, e]
}

fn text_of(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_use_are_found() {
        let text = "1: lo    inet 127.0.0.1/8 scope host lo\n7: bprun9    inet 10.79.3.1/30 scope global bprun9\n";
        assert_eq!(numbers_in(text), [3]);
    }

    #[test]
    fn a_loopback_name_server_is_no_use_to_a_guest() {
        let text = "# c\nnameserver 127.0.0.53\nnameserver 10.0.0.2\nnameserver fe80::1\nsearch x\n";
        assert_eq!(servers_in(text), [Ipv4Addr::new(10, 0, 0, 2)]);
    }

    #[test]
    fn a_mac_is_stable_and_locally_administered() {
        assert_eq!(mac_of("web"), mac_of("web"));
        assert_ne!(mac_of("web"), mac_of("db"));
        assert!(text_of(mac_of("web")).starts_with("02:"));
        assert!(tap_of(4_194_304).len() <= 15);
    }
}
