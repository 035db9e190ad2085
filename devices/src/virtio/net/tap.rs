//! Where frames go to and come from: a tap device of the host.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MRG_RXBUF,
};

use super::HEADER_LEN;

/// Frames that wait in a tap while nobody reads them: as many as the kernel keeps there unless it is told otherwise, twice.
const MOST_WAITING: usize = 2000;

/// Segments of UDP, which the kernel has since Linux 6.2, of both kinds or of none.
const TUN_F_USO: libc::c_uint = 0x20 | 0x40;

/// What a tap of any kernel can do, and we.
const FEATURES: [u32; 9] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_MRG_RXBUF,
];
/// What a kernel with [`TUN_F_USO`] can do beyond that.
const USO_FEATURES: [u32; 3] = [VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_USO];

/// Feature bits of links that take frames as a tap does, with or without segments of UDP.
pub(crate) fn tap_features(uso: bool) -> u64 {
    let more: &[u32] = if uso { &USO_FEATURES } else { &[] };
    FEATURES.iter().chain(more).fold(0, |bits, feature| bits | 1 << feature)
}

/// What a network device is connected to, or one queue of it: a descriptor, not blocking, of which one read is a virtio
/// header and a frame, and to which one write is the same.
pub trait Link: AsFd + Send + Sync {
    /// What it can do for a driver, as feature bits.
    fn features(&self) -> u64;

    /// The guest takes frames of these kinds from now on, as negotiated feature bits say. Holds for all queues of a link.
    ///
    /// # Errors
    /// The host cannot.
    fn set_offloads(&self, features: u64) -> io::Result<()>;

    /// From now on frames come to this queue of the link, or to the others only and what waits is thrown away. Never
    /// called for a link that is the only one.
    ///
    /// # Errors
    /// The host cannot.
    fn attach(&self, on: bool) -> io::Result<()>;
}

/// How many queues of a tap are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TapQueues {
    /// So many, or it is an error.
    Exactly(usize),
    /// So many if the tap was made for several, else one.
    UpTo(usize),
}

/// A tap device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is longer than the kernel allows.
    #[error("tap name {0:?} is not 1 to 15 bytes long")]
    Name(String),
    /// No access to the tun driver.
    #[error("cannot open /dev/net/tun: {0}; {remedy}", remedy = open_remedy(.0))]
    Open(#[source] io::Error),
    /// The device has one queue.
    #[error(
        "tap {name} was made for one queue and {wanted} are asked for: make it anew (`ip link del {name}`, \
         `ip tuntap add {name} mode tap multi_queue`), or ask for one"
    )]
    SingleQueue {
        /// Which one.
        name: String,
        /// How many were asked for.
        wanted: usize,
    },
    /// The device cannot be attached to.
    #[error("cannot attach to tap {name}: {source}; is it in use by another process, or no tap?")]
    Attach {
        /// Which one.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The descriptor is not a tap with virtio headers.
    #[error("descriptor is not a tap device with a virtio header and without packet information")]
    Kind,
    /// It was there.
    #[error("the tap was deleted: make it again, and start the VM anew, which has no way to another one")]
    Gone,
    /// Header length or blocking mode cannot be set.
    #[error("cannot set a tap device up: {0}")]
    Setup(#[source] io::Error),
}

fn open_remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE) => "permit more open files (`ulimit -n`)",
        _ => "load the module tun, and run with the right to use it",
    }
}

/// One queue of a tap device with virtio headers.
#[derive(Debug)]
pub struct Tap {
    file: OwnedFd,
    uso: bool,
}

impl Tap {
    /// Attaches to the tap device `name`, which is made for several queues if there is none. There is one of these for
    /// each queue.
    ///
    /// # Errors
    /// No access, the device is in use, or it has not as many queues.
    pub fn open(name: &str, queues: TapQueues) -> Result<Vec<Self>, TapError> {
        let (TapQueues::Exactly(wanted) | TapQueues::UpTo(wanted)) = queues;
        // The kernel wants to be told what the tap is; this is how to find out.
        match Self::open_queue(name, libc::IFF_MULTI_QUEUE) {
            Ok(first) => {
                let others = (1..wanted).map(|_| Self::open_queue(name, libc::IFF_MULTI_QUEUE));
                std::iter::once(Ok(first)).chain(others).collect()
            }
            Err(TapError::Attach { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                let only = Self::open_queue(name, 0)?;
                match queues {
                    TapQueues::Exactly(wanted) if wanted > 1 => {
                        Err(TapError::SingleQueue { name: name.into(), wanted })
                    }
                    _ => Ok(vec![only]),
                }
            }
            Err(error) => Err(error),
        }
    }

    fn open_queue(name: &str, flags: libc::c_int) -> Result<Self, TapError> {
        let mut request = interface_request();
        if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains('\0') {
            return Err(TapError::Name(name.into()));
        }
        request.ifr_name.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from as libc::c_char);
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | flags) as libc::c_short;
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
        let file = file.map_err(TapError::Open)?;
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) };
        check(result).map_err(|source| TapError::Attach { name: name.into(), source })?;
        Self::set_up(file)
    }

    /// Takes over a descriptor that is attached to a tap device.
    ///
    /// # Errors
    /// It is something else, or has no virtio headers.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, TapError> {
        let mut request = interface_request();
        // SAFETY: TUNGETIFF writes one `ifreq`, which `request` is.
        let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &mut request) };
        check(result).map_err(|_| TapError::Kind)?;
        // SAFETY: any bytes are a valid number, and the call has set this field.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & wanted != wanted {
            return Err(TapError::Kind);
        }
        // SAFETY: plain flags of an open descriptor.
        let result = unsafe {
            let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
            if flags < 0 { flags } else { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) }
        };
        check(result).map_err(TapError::Setup)?;
        Self::set_up(File::from(fd))
    }

    /// The same tap once more, for another device than the one that has had it: what came in between is thrown away.
    ///
    /// # Errors
    /// The host has no descriptors left, or the tap is not there any more.
    pub fn again(&self) -> Result<Self, TapError> {
        let mut file = File::from(self.file.try_clone().map_err(TapError::Setup)?);
        // A frame that does not fit is cut, and thrown away all the same.
        let mut frame = [0; 64];
        for _ in 0..MOST_WAITING {
            match file.read(&mut frame) {
                Ok(0) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.raw_os_error() == Some(libc::EBADFD) => return Err(TapError::Gone),
                // Also one that the kernel cannot describe.
                Ok(_) | Err(_) => {}
            }
        }
        Ok(Self { file: file.into(), uso: self.uso })
    }

    fn set_up(file: File) -> Result<Self, TapError> {
        let len = HEADER_LEN as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one `int`.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &len) };
        check(result).map_err(TapError::Setup)?;
        let mut tap = Self { file: file.into(), uso: false };
        // Nobody has said yet what the guest takes, so that it may be anything for a moment.
        tap.uso = tap.take_offloads(libc::TUN_F_CSUM | TUN_F_USO).is_ok();
        tap.take_offloads(0).map_err(TapError::Setup)?;
        Ok(tap)
    }

    fn take_offloads(&self, offloads: libc::c_uint) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) })
    }
}

fn interface_request() -> libc::ifreq {
    // SAFETY: `ifreq` is plain data for which zeroes are valid.
    unsafe { std::mem::zeroed() }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Link for Tap {
    fn features(&self) -> u64 {
        tap_features(self.uso)
    }

    fn set_offloads(&self, features: u64) -> io::Result<()> {
        self.take_offloads(offloads_of(features))
    }

    fn attach(&self, on: bool) -> io::Result<()> {
        let mut request = interface_request();
        let flag = if on { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = flag as libc::c_short;
        // SAFETY: TUNSETQUEUE reads one `ifreq`, which `request` is.
        let result = check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETQUEUE, &request) });
        // What is so already, since another device has had this queue before, is refused with this.
        result.or_else(|error| if error.raw_os_error() == Some(libc::EINVAL) { Ok(()) } else { Err(error) })
    }
}

/// What the kernel is told of a driver with these features, so that it does not refuse whatever they are.
fn offloads_of(features: u64) -> libc::c_uint {
    let has = |feature: u32| features & 1 << feature != 0;
    // Without checksums the others mean nothing.
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut offloads = libc::TUN_F_CSUM;
    for (feature, offload) in [(VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4), (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6)]
    {
        if has(feature) {
            offloads |= offload;
        }
    }
    // Congestion marks are of TCP's segments.
    if has(VIRTIO_NET_F_GUEST_ECN) && offloads != libc::TUN_F_CSUM {
        offloads |= libc::TUN_F_TSO_ECN;
    }
    if has(VIRTIO_NET_F_GUEST_USO4) && has(VIRTIO_NET_F_GUEST_USO6) {
        offloads |= TUN_F_USO;
    }
    offloads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_asked_for_nothing_that_it_would_refuse() {
        let of = |list: &[u32]| offloads_of(list.iter().fold(0, |bits, feature| bits | 1 << feature));
        assert_eq!(of(&[VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6]), 0);
        let csum = VIRTIO_NET_F_GUEST_CSUM;
        assert_eq!(of(&[csum, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_USO4]), libc::TUN_F_CSUM);
        let ecn = of(&[csum, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO6]);
        assert_eq!(ecn, libc::TUN_F_CSUM | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN);
        assert_eq!(of(&[csum, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6]), libc::TUN_F_CSUM | TUN_F_USO);
    }
}
