//! Where frames go to and come from: a tap device of the host.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

use super::HEADER_LEN;

/// Frames that wait in a tap while nobody reads them: as many as the kernel keeps there unless it is told otherwise, twice.
const MOST_WAITING: usize = 2000;

/// What a network device is connected to: a descriptor, not blocking, of which one read is a virtio header and a frame,
/// and to which one write is the same.
pub trait Link: AsFd + Send {
    /// The guest takes frames of these kinds from now on, as negotiated feature bits say.
    ///
    /// # Errors
    /// The host cannot.
    fn set_offloads(&mut self, features: u64) -> io::Result<()>;
}

/// A tap device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is longer than the kernel allows.
    #[error("tap name {0:?} is not 1 to 15 bytes long")]
    Name(String),
    /// No access to the tun driver.
    #[error("cannot open /dev/net/tun: {0}; load the module tun, and run with the right to use it")]
    Open(#[source] io::Error),
    /// The device cannot be attached to.
    #[error("cannot attach to tap {name}: {source}; is it in use by another process, or made for several queues?")]
    Attach {
        /// Which one.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The descriptor is not a tap with virtio headers.
    #[error("descriptor is not a tap device with a virtio header and without packet information")]
    Kind,
    /// Header length or blocking mode cannot be set.
    #[error("cannot set a tap device up: {0}")]
    Setup(#[source] io::Error),
}

/// A tap device with virtio headers.
#[derive(Debug)]
pub struct Tap {
    file: OwnedFd,
}

impl Tap {
    /// Attaches to the tap device `name`, which is made if there is none.
    ///
    /// # Errors
    /// No access, or the device is in use.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let mut request = interface_request();
        if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains('\0') {
            return Err(TapError::Name(name.into()));
        }
        request.ifr_name.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from as libc::c_char);
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
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
    /// The host has no descriptors left.
    pub fn again(&self) -> Result<Self, TapError> {
        let mut file = File::from(self.file.try_clone().map_err(TapError::Setup)?);
        // A frame that does not fit is cut, and thrown away all the same.
        let mut frame = [0; 64];
        for _ in 0..MOST_WAITING {
            match file.read(&mut frame) {
                Ok(0) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // Also one that the kernel cannot describe. Should the tap be gone, the device will notice.
                Ok(_) | Err(_) => {}
            }
        }
        Ok(Self { file: file.into() })
    }

    fn set_up(file: File) -> Result<Self, TapError> {
        let len = HEADER_LEN as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one `int`.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &len) };
        check(result).map_err(TapError::Setup)?;
        Ok(Self { file: file.into() })
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
    fn set_offloads(&mut self, features: u64) -> io::Result<()> {
        let mut offloads = 0;
        // Without checksums the others mean nothing, and the kernel would refuse them.
        if features & 1 << VIRTIO_NET_F_GUEST_CSUM != 0 {
            offloads = libc::TUN_F_CSUM;
            for (feature, offload) in [
                (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
                (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
                (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
            ] {
                if features & 1 << feature != 0 {
                    offloads |= offload;
                }
            }
        }
        // SAFETY: TUNSETOFFLOAD takes its flags by value.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) })
    }
}
