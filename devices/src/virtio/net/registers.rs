//! What a driver can read of a network device, and how it uses what it is offered: Virtio 1.2, 5.1.2 to 5.1.4.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};

use super::NetConfig;
use super::commands::control_queue;
use crate::virtio::Virtqueue;

const QUEUE_SIZE: u16 = 256;
/// Commands come one at a time; each is up to four descriptors.
const CONTROL_QUEUE_SIZE: u16 = 64;

/// The registers of one device; they never change.
pub(super) struct Registers {
    pub(super) features: u64,
    pub(super) config: [u8; 12],
    pub(super) queue_sizes: Vec<u16>,
}

/// How one driver uses the queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Session {
    /// Pairs that it may use, from the first on: it knows of several, and has made these ready. At least one.
    pub(super) pairs: usize,
    /// Its control queue, if it uses one.
    pub(super) control: Option<usize>,
}

impl Session {
    /// Whether queue `queue` is one of frames.
    pub(super) fn is_data(&self, queue: usize) -> bool {
        queue < 2 * self.pairs && self.control != Some(queue)
    }
}

impl Registers {
    /// Of a device with `pairs` pairs, over a link that can do what `link_features` say.
    pub(super) fn new(config: &NetConfig, pairs: usize, link_features: u64) -> Self {
        let mut features = link_features | 1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS;
        // Address, status, number of pairs, MTU.
        let mut space = [0; 12];
        space[..6].copy_from_slice(&config.mac);
        space[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * pairs];
        if pairs > 1 {
            features |= 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;
            space[8..10].copy_from_slice(&(pairs as u16).to_le_bytes());
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        if let Some(mtu) = config.mtu {
            features |= 1 << VIRTIO_NET_F_MTU;
            space[10..].copy_from_slice(&mtu.to_le_bytes());
        }
        Self { features, config: space, queue_sizes }
    }

    /// What a driver does that has accepted `features` and enabled `queues`.
    pub(super) fn session(&self, features: u64, queues: &[Option<Virtqueue>]) -> Session {
        let enabled = |queue: usize| queues.get(queue).is_some_and(Option::is_some);
        let has = |feature: u32| features & 1 << feature != 0;
        let all = self.queue_sizes.len() / 2;
        let control = has(VIRTIO_NET_F_CTRL_VQ).then(|| control_queue(features, all)).filter(|queue| enabled(*queue));
        // Without commands there is no way to use more than one.
        let most = if has(VIRTIO_NET_F_MQ) && control.is_some() { all } else { 1 };
        let more = (1..most).take_while(|pair| enabled(2 * pair) && enabled(2 * pair + 1)).count();
        Session { pairs: 1 + more, control }
    }
}
