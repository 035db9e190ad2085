//! `/bin/probe` of the tiny image: what busybox cannot do. A test types these commands on the VM's console.
//!
//! `probe vsock-connect PORT TEXT` connects to the host, sends a line and prints the line that comes back;
//! `probe vsock-serve PORT` answers one connection from the host by sending each line back in capitals, until it closes;
//! `probe direct-from FILE DEVICE` writes the first page of a file to a device, without a copy: the file is mapped, and the
//! device gets the address. It says what came of it;
//! `probe disk DEVICE read|write BLOCK DEPTH COUNT` and `probe tcp-send|tcp-receive|tcp-ping ADDRESS COUNT` are loads
//! (`bedplate_tests::load`), and print how many microseconds they took; the last prints the mean and the 99th percentile.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use bedplate_tests::load::{self, DiskLoad};
use rustix::fs::OFlags;
use rustix::mm::{MapFlags, ProtFlags, mmap};
use socket2::{Domain, SockAddr, Socket, Type};

/// The address of the host, for every guest.
const HOST: u32 = 2;
/// Connections from anywhere.
const ANY: u32 = u32::MAX;

const USAGE: &str = "usage: probe vsock-connect PORT TEXT | vsock-serve PORT | direct-from FILE DEVICE | \
    disk DEVICE read|write BLOCK DEPTH COUNT | tcp-send ADDRESS BYTES | tcp-receive ADDRESS BYTES | tcp-ping ADDRESS COUNT";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["vsock-connect", port, text] => port_of(port).and_then(|port| connect(port, text)),
        ["vsock-serve", port] => port_of(port).and_then(serve),
        ["direct-from", file, device] => direct(file, device),
        ["disk", device, ref load @ ..] => disk(device, load),
        ["tcp-send", address, len] => number(len).and_then(|len| say(load::send(TcpStream::connect(address)?, len)?)),
        ["tcp-receive", address, len] => number(len).and_then(|len| {
            let start = Instant::now();
            load::receive(TcpStream::connect(address)?, len)?;
            say(start.elapsed())
        }),
        ["tcp-ping", address, count] => ping(address, count),
        _ => Err(io::Error::other(USAGE)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("probe: {error}");
            ExitCode::FAILURE
        }
    }
}

fn number(text: &str) -> io::Result<u64> {
    text.parse().map_err(|_| io::Error::other(format!("{text:?} is no number")))
}

fn say(time: Duration) -> io::Result<()> {
    println!("{}", time.as_micros());
    Ok(())
}

fn disk(device: &str, load: &[&str]) -> io::Result<()> {
    let load = DiskLoad::parse(load).ok_or_else(|| io::Error::other(USAGE))?;
    say(load.run(Path::new(device), true)?)
}

fn ping(address: &str, count: &str) -> io::Result<()> {
    let count = u32::try_from(number(count)?).map_err(io::Error::other)?.max(1);
    let times = load::ping(TcpStream::connect(address)?, count)?;
    let mean = times.iter().sum::<Duration>() / count;
    let slow = times[times.len() * 99 / 100];
    println!("{} {}", mean.as_nanos(), slow.as_nanos());
    Ok(())
}

fn port_of(text: &str) -> io::Result<u32> {
    text.parse().map_err(|_| io::Error::other(format!("{text:?} is not a port")))
}

fn connect(port: u32, text: &str) -> io::Result<()> {
    let mut socket = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    socket.connect(&SockAddr::vsock(HOST, port))?;
    writeln!(socket, "{text}")?;
    let mut answer = String::new();
    BufReader::new(&mut socket).read_line(&mut answer)?;
    print!("{answer}");
    Ok(())
}

fn serve(port: u32) -> io::Result<()> {
    let listener = Socket::new(Domain::VSOCK, Type::STREAM, None)?;
    listener.bind(&SockAddr::vsock(ANY, port))?;
    listener.listen(1)?;
    println!("listening");
    let (mut client, _) = listener.accept()?;
    let lines = BufReader::new(client.try_clone()?).lines();
    for line in lines {
        writeln!(client, "{}", line?.to_uppercase())?;
    }
    Ok(())
}

fn direct(file: &str, device: &str) -> io::Result<()> {
    const PAGE: usize = 4096;
    let file = File::open(file)?;
    // SAFETY: the kernel chooses the place.
    let page = unsafe { mmap(std::ptr::null_mut(), PAGE, ProtFlags::READ, MapFlags::SHARED, &file, 0) }?;
    // SAFETY: mapped above, for reading, until the process ends; nobody changes the file meanwhile.
    let page = unsafe { std::slice::from_raw_parts(page.cast::<u8>(), PAGE) };
    let flags = OFlags::DIRECT.bits().cast_signed();
    let mut device = File::options().write(true).custom_flags(flags).open(device)?;
    match device.write_all(page) {
        Ok(()) => println!("written"),
        Err(error) => println!("refused: {error}"),
    }
    Ok(())
}
