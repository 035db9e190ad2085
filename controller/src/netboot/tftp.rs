//! TFTP (RFC 1350) with its options (RFC 2347, 2348, 2349), reading only, and only two files: firmware needs it to get
//! iPXE, which speaks HTTP. Each transfer is a task with a socket of its own, as the protocol wants it.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::net::UdpSocket;
use tokio::sync::Semaphore;

/// iPXE for PC firmware.
pub const BIOS: &str = "undionly.kpxe";
/// iPXE for 64-bit UEFI.
pub const UEFI: &str = "snponly.efi";

/// Without the option. With it, at most what fits an Ethernet frame: 1500 less IP, UDP and our header.
const BLOCK: usize = 512;
const BLOCK_MAX: usize = 1468;
/// A block is sent again after this long, this often.
const RETRY: (Duration, u32) = (Duration::from_secs(1), 6);
/// Transfers at a time; more machines ask again by themselves.
const TRANSFERS: usize = 64;

const READ: u16 = 1;
const DATA: u16 = 3;
const ACK: u16 = 4;
const ERROR: u16 = 5;
const OPTIONS: u16 = 6;

/// The two files.
#[derive(Debug, Clone)]
pub struct Files {
    /// [`BIOS`].
    pub bios: Bytes,
    /// [`UEFI`].
    pub uefi: Bytes,
}

impl Files {
    fn find(&self, name: &str) -> Option<Bytes> {
        match name.trim_start_matches('/') {
            BIOS => Some(self.bios.clone()),
            UEFI => Some(self.uefi.clone()),
            _ => None,
        }
    }
}

/// A transfer that was asked for.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    file: String,
    block: Option<usize>,
    size: bool,
}

/// Answers requests that come to `socket` until it is dropped; transfers go out from `address`.
pub async fn serve(socket: &UdpSocket, address: Ipv4Addr, files: Arc<Files>) {
    let slots = Arc::new(Semaphore::new(TRANSFERS));
    let mut packet = [0; BLOCK + 4];
    loop {
        let (length, peer) = match socket.recv_from(&mut packet).await {
            Ok(received) => received,
            Err(error) => {
                tracing::debug!("TFTP: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else { continue };
        let request =
            parse(&packet[..length]).and_then(|r| files.find(&r.file).map(|file| (r, file)).ok_or("no such file"));
        tokio::spawn(async move {
            let _slot = slot;
            if let Err(error) = transfer(address, peer, request).await {
                tracing::debug!("TFTP to {peer}: {error}");
            }
        });
    }
}

fn parse(packet: &[u8]) -> Result<Request, &'static str> {
    let (code, rest) = packet.split_first_chunk::<2>().ok_or("no operation")?;
    if u16::from_be_bytes(*code) != READ {
        return Err("only reading is possible");
    }
    // Every string ends in a zero, the last one too.
    let text = rest.strip_suffix(&[0]).and_then(|t| std::str::from_utf8(t).ok()).ok_or("malformed request")?;
    let mut strings = text.split('\0');
    let (Some(file), Some(mode)) = (strings.next(), strings.next()) else { return Err("malformed request") };
    if !mode.eq_ignore_ascii_case("octet") {
        return Err("only the mode octet is possible");
    }
    let mut request = Request { file: file.to_owned(), block: None, size: false };
    while let (Some(name), Some(value)) = (strings.next(), strings.next()) {
        if name.eq_ignore_ascii_case("blksize") {
            request.block = value.parse().ok().filter(|n| *n >= 8).map(|n: usize| n.min(BLOCK_MAX));
        } else if name.eq_ignore_ascii_case("tsize") {
            request.size = true;
        }
    }
    Ok(request)
}

async fn transfer(address: Ipv4Addr, peer: SocketAddr, request: Result<(Request, Bytes), &str>) -> io::Result<()> {
    let socket = UdpSocket::bind((address, 0)).await?;
    socket.connect(peer).await?;
    let (request, file) = match request {
        Ok(found) => found,
        Err(why) => {
            let packet = [&ERROR.to_be_bytes()[..], &1u16.to_be_bytes(), why.as_bytes(), &[0]].concat();
            return socket.send(&packet).await.map(drop);
        }
    };
    let block = request.block.unwrap_or(BLOCK);
    if let Some(packet) = options(&request, file.len()) {
        deliver(&socket, &packet, 0).await?;
    }
    // The last block is shorter than the others, if need be empty: that is how the end is told.
    for number in 0..=file.len() / block {
        let start = number * block;
        let data = file.slice(start..file.len().min(start + block));
        // Block numbers wrap, which every client of large files expects.
        let wire = u16::try_from((number + 1) & 0xffff).unwrap_or(0);
        deliver(&socket, &[&DATA.to_be_bytes()[..], &wire.to_be_bytes(), &data].concat(), wire).await?;
    }
    Ok(())
}

/// What was agreed to, if anything was asked.
fn options(request: &Request, size: usize) -> Option<Vec<u8>> {
    let mut packet = OPTIONS.to_be_bytes().to_vec();
    if let Some(block) = request.block {
        packet.extend(format!("blksize\0{block}\0").bytes());
    }
    if request.size {
        packet.extend(format!("tsize\0{size}\0").bytes());
    }
    (packet.len() > 2).then_some(packet)
}

/// Sends `packet` until it is acknowledged as `number`.
async fn deliver(socket: &UdpSocket, packet: &[u8], number: u16) -> io::Result<()> {
    for _ in 0..RETRY.1 {
        socket.send(packet).await?;
        match tokio::time::timeout(RETRY.0, acknowledged(socket, number)).await {
            Ok(outcome) => return outcome,
            Err(_late) => {}
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "the client went silent"))
}

async fn acknowledged(socket: &UdpSocket, number: u16) -> io::Result<()> {
    let mut packet = [0; BLOCK];
    loop {
        let length = socket.recv(&mut packet).await?;
        let Some((head, _)) = packet[..length].split_first_chunk::<4>() else { continue };
        let (code, acked) = (u16::from_be_bytes([head[0], head[1]]), u16::from_be_bytes([head[2], head[3]]));
        if code == ERROR {
            // Firmware asks for the size alone first and breaks off then.
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the client broke off"));
        }
        // An older number is an echo of a block sent twice; answering it would double every block from there on.
        if code == ACK && acked == number {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_parse_within_limits() {
        let parsed = parse(b"\0\x01/undionly.kpxe\0octet\0tsize\x000\0blksize\x009000\0windowsize\x004\0").unwrap();
        assert_eq!(parsed, Request { file: "/undionly.kpxe".into(), block: Some(BLOCK_MAX), size: true });
        assert_eq!(parse(b"\0\x01x\0OCTET\0").unwrap(), Request { file: "x".into(), block: None, size: false });
        for bad in [
            &b""[..],
            b"\0",
            b"\0\x01",
            b"\0\x01x\0octet",
            b"\0\x01x\0netascii\0",
            b"\0\x02x\0octet\0",
            b"\0\x01\xff\0octet\0",
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
        assert_eq!(parse(b"\0\x01x\0octet\0blksize\x001\0").unwrap().block, None);
    }

    #[test]
    fn only_two_files_are_there() {
        let files = Files { bios: Bytes::from_static(b"b"), uefi: Bytes::from_static(b"u") };
        assert_eq!(files.find("undionly.kpxe").unwrap(), "b");
        assert_eq!(files.find("/snponly.efi").unwrap(), "u");
        for bad in ["", "/", "../etc/passwd", "undionly.kpxe/..", "UNDIONLY.KPXE"] {
            assert!(files.find(bad).is_none(), "{bad}");
        }
    }
}
