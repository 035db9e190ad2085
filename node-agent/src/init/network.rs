//! The machine's own network: an address by DHCP for the interface that it booted from, kept for as long as it runs.

use std::fmt::Write;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::thread;
use std::time::Duration;

use bedplate_api::client::Endpoint;
use tokio::time::sleep;

use super::clock;
use super::cmdline::BootOptions;
use super::console::say;
use super::signals;
use crate::identity::format_mac;
use crate::net::dhcp::client::Client;
use crate::net::dhcp::exchange::Grant;
use crate::net::link::{Link, Links, NetError};

/// How often to look for an interface that is not there yet, and to ask again where nobody answered.
const AGAIN: Duration = Duration::from_secs(1);
/// How often to ask again for more time.
const RENEW_AGAIN: Duration = Duration::from_secs(30);
/// The longest wait between questions after the time.
const MAX_CLOCK_WAIT: Duration = Duration::from_secs(60);

/// Begins, in a thread of its own, which the main thread hears of when there is an address.
pub(super) fn run_in_thread(options: BootOptions) {
    let begun = thread::Builder::new().name("network".to_owned()).spawn(move || {
        // Whatever goes wrong in here, the machine must get back to its network.
        loop {
            if let Err(e) = begin(&options) {
                say(&format!("the network failed: {e}; it is tried again"));
            }
            thread::sleep(AGAIN);
        }
    });
    if let Err(e) = begun {
        say(&format!("the network's thread could not be started: {e}"));
    }
}

fn begin(options: &BootOptions) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(keep_address(options))
}

async fn keep_address(options: &BootOptions) -> io::Result<()> {
    let links = Links::open()?;
    if let Ok(Some(loopback)) = links.find("lo").await {
        links.up(&loopback).await.unwrap_or_else(|e| say(&e.to_string()));
    }
    loop {
        let (link, client, mut held) = acquire(&links, options.mac).await;
        apply(&links, &link, &held).await.map_err(io::Error::other)?;
        say(&format!("{} has {} by DHCP", link.name, held.address.address));
        signals::network_is_up();
        if let Some(control) = options.control.clone() {
            tokio::spawn(keep_asking_for_time(control));
        }
        while let Some(more) = renew(&client, &held).await {
            if more != held {
                apply(&links, &link, &more).await.map_err(io::Error::other)?;
            }
            held = more;
        }
        say(&format!("{} has lost its address; asks for a new one", link.name));
    }
}

/// Asks on the interface with the address `mac`, else on each in turn, until somebody grants an address.
async fn acquire(links: &Links, mac: Option<[u8; 6]>) -> (Link, Client, Grant) {
    let mut told = false;
    loop {
        let candidates = candidates(links, mac).await;
        if candidates.is_empty() && !told {
            told = true;
            say(&match mac {
                Some(mac) => format!("waits for the network interface with the address {}", format_mac(mac)),
                None => "waits for a network interface".to_owned(),
            });
        }
        for (link, mac) in candidates {
            if let Err(e) = links.up(&link).await {
                say(&e.to_string());
                continue;
            }
            match ask(&link, mac).await {
                Ok(Some((client, grant))) => return (link, client, grant),
                Ok(None) => say(&format!("no DHCP server has answered on {} yet", link.name)),
                Err(e) => say(&format!("DHCP on {}: {e}", link.name)),
            }
        }
        sleep(AGAIN).await;
    }
}

async fn ask(link: &Link, mac: [u8; 6]) -> io::Result<Option<(Client, Grant)>> {
    let client = Client::open(&link.name, mac)?;
    Ok(client.acquire().await?.map(|grant| (client, grant)))
}

/// Interfaces to ask on, with their addresses.
async fn candidates(links: &Links, mac: Option<[u8; 6]>) -> Vec<(Link, [u8; 6])> {
    let all = links.all().await.unwrap_or_else(|e: NetError| {
        say(&e.to_string());
        Vec::new()
    });
    let with_mac = all.into_iter().filter(|l| !l.loopback).filter_map(|l| l.mac.map(|m| (l, m)));
    with_mac.filter(|(_, m)| mac.is_none_or(|mac| mac == *m)).collect()
}

async fn apply(links: &Links, link: &Link, grant: &Grant) -> Result<(), NetError> {
    links.set_address(link, grant.address).await?;
    if let Some(gateway) = grant.gateway {
        links.set_default_route(link, gateway).await?;
    }
    let servers: &[Ipv4Addr] = &grant.dns;
    let text = servers.iter().fold(String::new(), |mut text, server| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "nameserver {server}");
        text
    });
    let written = fs::create_dir_all("/etc").and_then(|()| fs::write("/etc/resolv.conf", text));
    written.map_err(|e| NetError::new("write", "/etc/resolv.conf", &e))
}

/// Waits until it is time, then asks for more until there is more. `None`: there is none, and the address must go.
async fn renew(client: &Client, held: &Grant) -> Option<Grant> {
    let lasts = Duration::from_secs(u64::from(held.seconds));
    let mut passed = Duration::from_secs(u64::from(held.renew_seconds)).min(lasts);
    sleep(passed).await;
    while passed < lasts {
        // For the last eighth anybody may say yes: the one who gave the address may be gone.
        let anybody = passed >= lasts / 8 * 7;
        match client.renew(held, anybody).await {
            Ok(Some(more)) => return Some(more),
            Ok(None) => {}
            Err(e) => say(&format!("the address could not be renewed: {e}")),
        }
        sleep(RENEW_AGAIN).await;
        passed += RENEW_AGAIN;
    }
    None
}

async fn keep_asking_for_time(control: Endpoint) {
    let mut wait = AGAIN;
    while !clock::set_from(&control).await {
        sleep(wait).await;
        wait = (wait * 2).min(MAX_CLOCK_WAIT);
    }
}
