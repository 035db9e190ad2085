//! Taps: one per VM, made to stay when nobody has it open, so that the VMM can open it by name.
//!
//! The one unsafe corner of the network: the kernel makes taps by `ioctl` only.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::os::fd::AsRawFd;

use bedplate_api::VmId;

use super::link::NetError;

/// Names of our taps begin so. Nothing else in the system may be called so.
pub const PREFIX: &str = "bp-";

/// `struct ifreq` as far as `TUNSETIFF` reads it, padded to the size that the kernel copies.
#[repr(C)]
struct Request {
    name: [libc::c_char; libc::IFNAMSIZ],
    flags: libc::c_short,
    padding: [u8; 22],
}
const _: () = assert!(size_of::<Request>() == size_of::<libc::ifreq>());

/// The name of VM `id`'s tap: the prefix and the first eight hex digits of the id.
pub fn name(id: VmId) -> String {
    let hex = id.as_uuid().simple().to_string();
    format!("{PREFIX}{}", &hex[..8])
}

/// The MAC address of VM `id`'s guest: locally administered, and the first 40 bits of the id.
pub fn guest_mac(id: VmId) -> [u8; 6] {
    let [a, b, c, d, e, ..] = *id.as_uuid().as_bytes();
    [0x02, a, b, c, d, e]
}

/// Makes the tap `name`, with queues for several vCPUs or with one, or finds it there as it is.
///
/// # Errors
/// There is no `/dev/net/tun`, or the kernel refuses.
pub fn create(name: &str, several: bool) -> Result<(), NetError> {
    let what = format!("tap {name}");
    // A tap with several queues can be opened by a second process, which would get a part of the frames.
    if exists(name) {
        return Ok(());
    }
    let device = OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    let device =
        device.map_err(|e| NetError::new("create", &what, &format!("/dev/net/tun: {e}; load the module tun")))?;
    let mut request = Request { name: [0; libc::IFNAMSIZ], flags: 0, padding: [0; 22] };
    if name.len() >= libc::IFNAMSIZ {
        return Err(NetError::new("create", &what, &"the name is too long"));
    }
    for (to, from) in request.name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // Constants of the kernel's interface, all far below the sign bit.
    let queues = if several { libc::IFF_MULTI_QUEUE } else { 0 };
    request.flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues) as libc::c_short;
    // SAFETY: `request` has the size and layout of `struct ifreq` and outlives the call; the descriptor is open.
    let attached = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if attached < 0 {
        return Err(NetError::new("create", &what, &std::io::Error::last_os_error()));
    }
    // SAFETY: `TUNSETPERSIST` takes an integer; the descriptor is open and attached.
    let kept = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETPERSIST, 1 as libc::c_ulong) };
    if kept < 0 {
        return Err(NetError::new("keep", &what, &std::io::Error::last_os_error()));
    }
    Ok(())
}

fn exists(name: &str) -> bool {
    let Ok(name) = CString::new(name) else { return false };
    // SAFETY: a terminated string that lives through the call.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_come_from_the_id() {
        let id: VmId = "a1b2c3d4-e5f6-4788-9900-aabbccddeeff".parse().unwrap();
        assert_eq!(name(id), "bp-a1b2c3d4");
        assert_eq!(guest_mac(id), [0x02, 0xa1, 0xb2, 0xc3, 0xd4, 0xe5]);
        assert!(guest_mac(id)[0] & 1 == 0 && guest_mac(id)[0] & 2 == 2, "unicast and locally administered");
    }
}
