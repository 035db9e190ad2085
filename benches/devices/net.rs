//! Frames between a driver and a tap.
//!
//! The taps are in a network namespace of their own, where nobody takes a frame: what is compared is the device's way to
//! the tap, not what comes behind it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use bedplate_benches::{Pair, Unit, nanos};
use bedplate_devices::testing::{Driver, DriverQueue, Piece};
use bedplate_devices::virtio::limiter::LimiterConfig;
use bedplate_devices::virtio::net::{Net, NetConfig, Tap, TapQueues};
use criterion::Criterion;

use crate::flight::Flight;

const RX: usize = 0;
const TX: usize = 1;
/// Before each frame.
const HEADER: usize = 12;
const FRAME: usize = 1514;
/// A place for a frame and its header.
const PLACE: u64 = 4096;

const CONFIG: NetConfig =
    NetConfig { mac: [2, 0, 0, 0, 0, 1], mtu: None, rx_limits: LimiterConfig::NONE, tx_limits: LimiterConfig::NONE };

/// Leaves the network of the host: has to come last.
pub fn benchmark(c: &mut Criterion) {
    // SAFETY: the flag shares and separates neither memory nor descriptors.
    let left = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
    if !left || !Path::new("/dev/net/tun").exists() {
        return println!("skipped: frames: this takes root and /dev/net/tun\n");
    }
    for depth in [1, 32] {
        transmit(c, depth);
        receive(c, depth);
    }
}

/// A tap that is up, and the number of its interface.
fn tap(name: &str) -> (Tap, u32) {
    let tap = Tap::open(name, TapQueues::Exactly(1)).unwrap().remove(0);
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM);
    // SAFETY: zeros are a valid value of this type.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the request is initialised, and outlives the call.
    let up = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    assert_eq!(up, 0, "{}", io::Error::last_os_error());
    // SAFETY: the name is terminated, since it is shorter than its array.
    let index = unsafe { libc::if_nametoindex(request.ifr_name.as_ptr()) };
    (tap, index)
}

fn socket(family: i32, kind: i32) -> OwnedFd {
    // SAFETY: no pointer is passed.
    let raw = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, 0) };
    assert!(raw >= 0, "{}", io::Error::last_os_error());
    // SAFETY: the descriptor is new and nobody else's.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

/// A frame to nobody, after a header of zeros.
fn frame() -> Vec<u8> {
    let mut frame = vec![0; HEADER + FRAME];
    frame[HEADER..][..14].copy_from_slice(&[2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1, 0x88, 0xb5]);
    frame
}

fn pair(
    c: &mut Criterion,
    what: &str,
    depth: u64,
    ours: impl FnMut(u64) -> std::time::Duration,
    bare: (&str, impl FnMut(u64) -> std::time::Duration),
) {
    let what = format!("{what}, depth {depth}");
    Pair { what: &what, ours: "network device", bare: bare.0, unit: Unit::Bytes(FRAME as u64) }
        .run_in_flight(c, depth, ours, bare.1);
}

fn transmit(c: &mut Criterion, depth: u64) {
    let ((ours, _), (bare, _)) = (tap("bench0"), tap("bench1"));
    let mut flight = Flight::new(Net::new(vec![ours], CONFIG).unwrap(), TX, depth);
    let frame = frame();
    (0..depth).for_each(|slot| flight.driver.put(Driver::BUFFERS + slot * PLACE, &frame));
    let device = |count| {
        nanos(|| flight.run(count, |_, slot| vec![Piece::Read(Driver::BUFFERS + slot * PLACE, frame.len() as u32)]))
    };
    let write =
        |count| nanos(|| (0..count).for_each(|_| assert_eq!(rustix::io::write(&bare, &frame), Ok(frame.len()))));
    pair(c, "a frame to a tap", depth, device, ("write", write));
}

/// Frames come from a packet socket, which is counted on both sides.
fn receive(c: &mut Criterion, depth: u64) {
    let ((ours, number), (bare, other)) = (tap("bench0"), tap("bench1"));
    let (source, frame) = (Source::new(), frame());
    let mut receiver = Receiver::new(Net::new(vec![ours], CONFIG).unwrap());
    let device = |count| {
        nanos(|| {
            for start in (0..count).step_by(depth as usize) {
                let several = depth.min(count - start);
                (0..several).for_each(|_| source.send(number, &frame[HEADER..]));
                receiver.take(several);
            }
        })
    };
    let mut buffer = vec![0; PLACE as usize];
    let read = |count| {
        nanos(|| {
            for start in (0..count).step_by(depth as usize) {
                let several = depth.min(count - start);
                (0..several).for_each(|_| source.send(other, &frame[HEADER..]));
                (0..several).for_each(|_| assert!(rustix::io::read(&bare, &mut buffer[..]).is_ok()));
            }
        })
    };
    pair(c, "a frame from a tap", depth, device, ("read", read));
}

/// A driver with a ring full of buffers.
struct Receiver {
    driver: Driver,
    queue: DriverQueue,
    offered: u64,
}

impl Receiver {
    const BUFFERS: u64 = 128;

    fn new(device: Net<Tap>) -> Self {
        let mut driver = Driver::attach(device);
        let queue = driver.up().swap_remove(RX);
        let mut receiver = Self { driver, queue, offered: 0 };
        receiver.offer(Self::BUFFERS);
        receiver
    }

    fn offer(&mut self, count: u64) {
        for _ in 0..count {
            let place = Driver::BUFFERS + self.offered % Self::BUFFERS * PLACE;
            self.queue.add(&[Piece::Write(place, PLACE as u32)]);
            self.offered += 1;
        }
        self.driver.kick(&self.queue);
    }

    /// Waits for so many frames and offers their buffers again.
    fn take(&mut self, count: u64) {
        let mut left = count;
        while left > 0 {
            self.queue.wait();
            left -= 1;
            while left > 0 && self.queue.take().is_some() {
                left -= 1;
            }
        }
        self.offer(count);
    }
}

/// Sends frames out of interfaces.
struct Source(OwnedFd);

impl Source {
    fn new() -> Self {
        Self(socket(libc::AF_PACKET, libc::SOCK_RAW))
    }

    fn send(&self, interface: u32, frame: &[u8]) {
        // SAFETY: zeros are a valid value of this type.
        let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        to.sll_family = libc::AF_PACKET as u16;
        to.sll_ifindex = interface as i32;
        // SAFETY: both pointers are valid for as many bytes as is said.
        let sent = unsafe {
            libc::sendto(
                self.0.as_fd().as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const to).cast(),
                size_of_val(&to) as u32,
            )
        };
        assert_eq!(usize::try_from(sent).ok(), Some(frame.len()), "{}", io::Error::last_os_error());
    }
}
