//! Other nodes that have what lacks here. The control node says who; where it cannot be asked, those that were asked
//! last are. A peer vouches for nothing: what it sends is verified like everything, and what it does not send is had from the
//! repository.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bedplate_api::client::{Client, ClientError, Endpoint};
use bedplate_api::image::{Locate, Located, PeerChunks};
use bedplate_api::{Digest, NodeId};
use tokio::time::{Instant, timeout};

use super::fetch::Urgency;

/// How long a peer that failed is left alone.
const REST: Duration = Duration::from_secs(30);
/// Peers that are remembered, each with its connections.
const MOST: usize = 16;
/// How long the control node may take to say whom to ask: a guest may wait meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);
/// Peers that are asked where the control node cannot say whom to ask.
const BLIND: usize = 2;

/// The way to other nodes.
#[derive(Debug)]
pub(super) struct Peers {
    /// This node.
    id: NodeId,
    /// What nodes show to each other.
    token: String,
    known: Mutex<HashMap<SocketAddr, Known>>,
}

#[derive(Debug)]
struct Known {
    client: Client,
    /// With connections on the threads of copies.
    client_of_copies: Client,
    used: Instant,
    /// Not before that.
    rests_until: Option<Instant>,
}

impl Known {
    fn client_for(&self, urgency: Urgency) -> Client {
        match urgency {
            Urgency::Guest => self.client.clone(),
            Urgency::Copy => self.client_of_copies.clone(),
        }
    }

    fn rests(&self, now: Instant) -> bool {
        self.rests_until.is_some_and(|until| now < until)
    }
}

impl Peers {
    pub(super) fn new(id: NodeId, token: String) -> Self {
        Self { id, token, known: Mutex::default() }
    }

    /// Whom to ask first for which of `wanted`, chunks of `image`. Some may be in no list.
    pub(super) async fn locate(&self, control: &Client, image: Digest, wanted: &[Digest]) -> Vec<PeerChunks> {
        let locate = Locate { node: self.id, image, digests: wanted.to_vec() };
        let mut peers = match timeout(PATIENCE, control.locate_chunks(&locate)).await {
            Ok(Ok(Located { peers })) => peers,
            Ok(Err(ClientError::Api(_))) => return Vec::new(),
            Ok(Err(_)) | Err(_) => self.blindly(wanted),
        };
        let now = Instant::now();
        let known = self.known();
        peers.retain(|peer| known.get(&peer.address).is_none_or(|known| !known.rests(now)));
        peers
    }

    /// All that is wanted, from one peer after the other; the later ones are asked for what the earlier ones lacked.
    fn blindly(&self, wanted: &[Digest]) -> Vec<PeerChunks> {
        let (now, known) = (Instant::now(), self.known());
        let awake = known.iter().filter(|(_, known)| !known.rests(now));
        let mut latest: Vec<_> = awake.map(|(address, known)| (known.used, *address)).collect();
        latest.sort_unstable_by(|a, b| b.cmp(a));
        latest.into_iter().take(BLIND).map(|(_, address)| PeerChunks { address, digests: wanted.to_vec() }).collect()
    }

    /// The client of a peer, for who is in such a hurry.
    pub(super) fn client(&self, address: SocketAddr, urgency: Urgency) -> Result<Client, ClientError> {
        let now = Instant::now();
        if let Some(known) = self.known().get_mut(&address) {
            known.used = now;
            return Ok(known.client_for(urgency));
        }
        // Not under the lock, which who waits for a guest takes too. Should somebody else have made it meanwhile, theirs goes.
        let client = Client::new(Endpoint::Http(address.to_string()), Some(self.token.clone()))?;
        let new = Known { client_of_copies: client.another(), client, used: now, rests_until: None };
        let client = new.client_for(urgency);
        let mut known = self.known();
        if known.len() >= MOST
            && let Some(oldest) = known.iter().min_by_key(|(_, known)| known.used).map(|(address, _)| *address)
        {
            known.remove(&oldest);
        }
        known.insert(address, new);
        Ok(client)
    }

    /// It failed: it is left alone for a while.
    pub(super) fn rest(&self, address: SocketAddr) {
        if let Some(known) = self.known().get_mut(&address) {
            known.rests_until = Some(Instant::now() + REST);
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<SocketAddr, Known>> {
        // It is whole after each statement.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How long a peer may wait for what is on its way to it: a guest stands still meanwhile.
pub(super) const fn wait_seconds(urgency: Urgency) -> u64 {
    match urgency {
        Urgency::Guest => 1,
        Urgency::Copy => 10,
    }
}
