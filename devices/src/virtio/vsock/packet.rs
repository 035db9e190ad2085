//! The header of every packet, Virtio 1.2, 5.10.6. Offsets and byte order are `virtio-vsock`'s; the buffers are ours, as
//! a driver may cut a packet into descriptors in any way.

use virtio_vsock::packet::{PKT_HEADER_SIZE, VsockPacket};

use crate::virtio::View;

/// Bytes of a header.
pub(super) const HEADER_LEN: usize = PKT_HEADER_SIZE;
/// The address of the host.
pub(super) const HOST_CID: u64 = 2;
/// The only type of socket there is.
pub(super) const TYPE_STREAM: u16 = 1;
/// Flags of a shutdown: the sender will not receive, will not send any more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
pub(super) const SHUTDOWN_SEND: u32 = 2;
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for.
pub(super) mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RESET: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const DATA: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// A connection: the host's port and the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub host: u32,
    pub guest: u32,
}

/// A packet's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub socket_type: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    /// A header from the host to the guest.
    pub(super) fn to_guest(guest_cid: u64, ports: Ports, op: u16) -> Self {
        Self {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            socket_type: TYPE_STREAM,
            op,
            ..Self::default()
        }
    }

    /// The refusal of this packet, which has come from the guest.
    pub(super) fn refusal(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            socket_type: self.socket_type,
            op: op::RESET,
            ..Self::default()
        }
    }

    /// The connection that a packet from the guest belongs to.
    pub(super) fn ports(&self) -> Ports {
        Ports { host: self.dst_port, guest: self.src_port }
    }

    /// Takes a header from the front of a packet; `None` if the packet is too short.
    pub(super) fn parse(packet: View<'_>) -> Option<(Self, View<'_>)> {
        let (front, data) = packet.split_at(HEADER_LEN)?;
        let mut bytes = [0; HEADER_LEN];
        front.copy_to(&mut bytes);
        let mut place = bytes;
        let header = with_packet(&mut place, |packet| {
            packet.set_header_from_raw(&bytes).ok()?;
            Some(Self {
                src_cid: packet.src_cid(),
                dst_cid: packet.dst_cid(),
                src_port: packet.src_port(),
                dst_port: packet.dst_port(),
                len: packet.len(),
                socket_type: packet.type_(),
                op: packet.op(),
                flags: packet.flags(),
                buf_alloc: packet.buf_alloc(),
                fwd_cnt: packet.fwd_cnt(),
            })
        })?;
        Some((header, data))
    }

    /// The header as it stands in memory.
    pub(super) fn bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        with_packet(&mut bytes, |packet| {
            packet
                .set_src_cid(self.src_cid)
                .set_dst_cid(self.dst_cid)
                .set_src_port(self.src_port)
                .set_dst_port(self.dst_port)
                .set_len(self.len)
                .set_type(self.socket_type)
                .set_op(self.op)
                .set_flags(self.flags)
                .set_buf_alloc(self.buf_alloc)
                .set_fwd_cnt(self.fwd_cnt);
        });
        bytes
    }
}

fn with_packet<R>(bytes: &mut [u8; HEADER_LEN], call: impl FnOnce(&mut VsockPacket<'_, ()>) -> R) -> R {
    // SAFETY: the packet points to `bytes`, which stays borrowed until after the packet is gone.
    match unsafe { VsockPacket::new(bytes, None) } {
        Ok(mut packet) => call(&mut packet),
        Err(_) => unreachable!("the only error is a wrong length, and the type has the right one"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_the_layout_of_the_specification() {
        let ports = Ports { host: 0x0403_0201, guest: 5 };
        let header = Header { len: 6, flags: 7, buf_alloc: 8, fwd_cnt: 9, ..Header::to_guest(3, ports, op::DATA) };
        let bytes = header.bytes();
        assert_eq!(bytes[..8], 2u64.to_le_bytes());
        assert_eq!(bytes[8..16], 3u64.to_le_bytes());
        assert_eq!(bytes[16..24], [1, 2, 3, 4, 5, 0, 0, 0]);
        assert_eq!(bytes[24..], [6, 0, 0, 0, 1, 0, 5, 0, 7, 0, 0, 0, 8, 0, 0, 0, 9, 0, 0, 0]);
    }
}
