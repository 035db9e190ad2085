//! The control queue, Virtio 1.2, 5.1.6.5: a thread of its own that has next to nothing to do, so that no worker of frames
//! ever waits for the host to change a tap.
//!
//! One command is offered, how many pairs of queues the driver uses. Everything else gets `VIRTIO_NET_ERR`.

use std::sync::Arc;
use std::time::Duration;

use event_manager::EventSet;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};

use super::pairs::{Pair, Pairs, Refusal};
use crate::metrics::DeviceMetrics;
use crate::virtio::limiter::{BucketConfig, Limiter, LimiterConfig};
use crate::virtio::{Answer, Chain, Handler, Session};

/// Commands in a time. Each may take a lock that all networking of the host shares, and hold it for milliseconds; an
/// honest driver sends a handful in its life.
const RATE: BucketConfig = BucketConfig { size: 16, one_time_burst: 0, refill_time: Duration::from_secs(1) };
/// Class, command, and the number of pairs.
const COMMAND_LEN: usize = 4;
const CREDIT: u32 = 0;

/// Serves the control queue of a device with several pairs.
pub(super) struct Commands<P> {
    pairs: Arc<Pairs<P>>,
    limiter: Limiter,
    queue: usize,
}

/// Number of the control queue: behind all pairs, of which there is one for a driver that knows of no others.
pub(super) const fn control_queue(features: u64, pairs: usize) -> usize {
    if features & 1 << VIRTIO_NET_F_MQ != 0 { 2 * pairs } else { 2 }
}

impl<P: Pair> Commands<P> {
    /// # Errors
    /// The host has no descriptors left.
    pub(super) fn open(pairs: &Arc<Pairs<P>>) -> std::io::Result<Self> {
        let limiter = Limiter::open(LimiterConfig { bandwidth: None, operations: Some(RATE) })?;
        Ok(Self { pairs: Arc::clone(pairs), limiter, queue: 0 })
    }

    fn serve(&self, session: &mut Session<'_, '_>) {
        let (features, metrics) = (session.features, session.metrics);
        if let Some(queue) = session.queue(self.queue) {
            queue.drain(|chain| self.answer(chain, features, metrics));
        }
    }

    fn answer(&self, chain: &Chain, features: u64, metrics: &DeviceMetrics) -> Answer {
        if chain.fault.is_some() {
            return Answer::Used(0);
        }
        if chain.writable.is_empty() {
            metrics.guest_faults.increment();
            return Answer::Used(0);
        }
        if !self.limiter.admit(1) {
            return Answer::Wait;
        }
        let ack = match self.execute(chain, features) {
            Ok(()) => VIRTIO_NET_OK,
            Err(refusal) => {
                match refusal {
                    Refusal::Guest => metrics.guest_faults.increment(),
                    Refusal::Host(error) => {
                        metrics.host_fault(|| format!("cannot change how many queues a tap has: {error}"));
                    }
                }
                VIRTIO_NET_ERR
            }
        };
        Answer::Used(chain.writable.view().copy_from(&[ack as u8]) as u32)
    }

    fn execute(&self, chain: &Chain, features: u64) -> Result<(), Refusal> {
        let mut command = [0; COMMAND_LEN];
        let view = chain.readable.view();
        let is_whole = view.len() == COMMAND_LEN && view.copy_to(&mut command) == COMMAND_LEN;
        let [class, which, low, high] = command;
        let is_known = (u32::from(class), u32::from(which)) == (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
        if !is_whole || !is_known || features & 1 << VIRTIO_NET_F_MQ == 0 {
            return Err(Refusal::Guest);
        }
        self.pairs.use_pairs(u16::from_le_bytes([low, high]).into())
    }
}

impl<P: Pair> Handler for Commands<P> {
    fn started(&mut self, session: &mut Session<'_, '_>) {
        self.queue = control_queue(session.features, self.pairs.all().len());
        if let Err(error) = session.watch(&self.limiter, CREDIT, EventSet::IN) {
            session.metrics.host_fault(|| format!("cannot watch a network device's timer: {error}"));
        }
    }

    fn notified(&mut self, _queue: usize, session: &mut Session<'_, '_>) {
        self.serve(session);
    }

    fn ready(&mut self, _token: u32, _events: EventSet, session: &mut Session<'_, '_>) {
        self.limiter.expired();
        self.serve(session);
    }
}
