//! Which node has which chunk, as far as this process has seen: so that a node is sent to its peers, and the repository
//! sends each chunk of an image that many nodes copy at once to about one of them.
//!
//! A hint, kept in memory and bounded: a peer that does not have what it is asked for leaves it out, and who asked turns
//! to the repository. Who asks again soon for the same chunk was not helped by its peers, and is sent to none.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bedplate_api::Digest;
use bedplate_api::image::{Located, PeerChunks};

use crate::records::NodeNumber;

/// Chunks that are remembered: 16 GiB of them, in some 30 MB.
const MOST_CHUNKS: usize = 1 << 18;
/// Nodes that are remembered for each; the latest.
const MOST_NODES: usize = 4;
/// Who asks for a chunk again within this time has not got it.
const AGAIN: Duration = Duration::from_secs(60);

/// A node that others may be sent to.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    /// Which.
    pub node: NodeNumber,
    /// Where its agent serves.
    pub address: SocketAddr,
    /// It has reported that it has the image whole.
    pub whole: bool,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Sharing(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// Who asked for a chunk, and when.
    chunks: HashMap<Digest, Vec<(NodeNumber, Instant)>>,
    /// In the order in which they came to be known.
    order: VecDeque<Digest>,
    /// Grows with each request, so that peers take turns.
    turn: usize,
}

impl Sharing {
    /// Tells `asker` whom of `peers` to ask for each of `digests`, and notes that it is getting them.
    pub fn locate(&self, asker: NodeNumber, peers: &[Peer], digests: &[Digest], now: Instant) -> Located {
        // It is whole after each statement.
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.turn = known.turn.wrapping_add(1);
        let mut by_peer: BTreeMap<SocketAddr, Vec<Digest>> = BTreeMap::new();
        for digest in digests {
            if let Some(address) = known.ask(asker, peers, digest, now) {
                by_peer.entry(address).or_default().push(*digest);
            }
        }
        let peers = by_peer.into_iter().map(|(address, digests)| PeerChunks { address, digests });
        Located { peers: peers.collect() }
    }
}

impl Known {
    fn ask(&mut self, asker: NodeNumber, peers: &[Peer], digest: &Digest, now: Instant) -> Option<SocketAddr> {
        let turn = self.turn;
        let nodes = self.note(digest);
        let before = nodes.iter().position(|(node, _)| *node == asker).map(|at| nodes.remove(at));
        let has = |peer: &&Peer| peer.node != asker && (peer.whole || nodes.iter().any(|(node, _)| *node == peer.node));
        let count = peers.iter().filter(has).count();
        let chosen = turn.checked_rem(count).and_then(|nth| peers.iter().filter(has).nth(nth));
        if nodes.len() == MOST_NODES {
            nodes.remove(0);
        }
        // Who asks again and again is sent to peers once in that time.
        let again = before.filter(|(_, at)| now.saturating_duration_since(*at) < AGAIN);
        nodes.push(again.unwrap_or((asker, now)));
        chosen.filter(|_| again.is_none()).map(|peer| peer.address)
    }

    /// The nodes of a chunk, which is known from now on.
    fn note(&mut self, digest: &Digest) -> &mut Vec<(NodeNumber, Instant)> {
        if !self.chunks.contains_key(digest) {
            if self.order.len() == MOST_CHUNKS {
                self.order.pop_front().map(|oldest| self.chunks.remove(&oldest));
            }
            self.order.push_back(*digest);
        }
        self.chunks.entry(*digest).or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(n: u32) -> Digest {
        let mut bytes = [1; 32];
        bytes[..4].copy_from_slice(&n.to_le_bytes());
        Digest::from_bytes(bytes)
    }

    fn peer(n: u32) -> Peer {
        let address = SocketAddr::from(([10, 0, 0, n as u8], 7));
        Peer { node: NodeNumber(n), address, whole: false }
    }

    fn sent_to(located: &Located) -> Vec<(u8, usize)> {
        let last = |address: SocketAddr| match address.ip() {
            std::net::IpAddr::V4(ip) => ip.octets()[3],
            std::net::IpAddr::V6(_) => 0,
        };
        located.peers.iter().map(|peer| (last(peer.address), peer.digests.len())).collect()
    }

    #[test]
    fn each_chunk_is_sent_by_the_repository_once() {
        let (sharing, peers, now) = (Sharing::default(), [1, 2, 3].map(peer), Instant::now());
        let wanted = [1, 2].map(digest);
        let ask = |node: u32| sent_to(&sharing.locate(NodeNumber(node), &peers, &wanted, now));
        assert_eq!(ask(1), [], "nobody has them");
        assert_eq!(ask(2), [(1, 2)]);
        assert!(matches!(ask(3)[..], [(1 | 2, 2)]));
        assert_eq!(ask(2), [], "the first was of no help");
    }

    #[test]
    fn peers_take_turns_and_those_that_have_all_count() {
        let (sharing, now) = (Sharing::default(), Instant::now());
        let peers = [1, 2, 3, 4].map(|n| Peer { whole: n > 1, ..peer(n) });
        let mut seen: Vec<u8> = (0..6)
            .flat_map(|n| sent_to(&sharing.locate(NodeNumber(4), &peers, &[digest(n)], now)))
            .map(|(node, _)| node)
            .collect();
        seen.sort_unstable();
        assert_eq!(seen, [2, 2, 2, 3, 3, 3], "not to itself, nor to one that has nothing");
    }

    #[test]
    fn after_a_while_who_asks_again_may_be_helped() {
        let (sharing, peers, now) = (Sharing::default(), [1, 2].map(peer), Instant::now());
        let ask = |node: u32, at| sent_to(&sharing.locate(NodeNumber(node), &peers, &[digest(1)], at));
        assert_eq!(ask(1, now), []);
        assert_eq!(ask(2, now), [(1, 1)]);
        assert_eq!(ask(1, now + AGAIN / 2), []);
        assert_eq!(ask(1, now + AGAIN), [(2, 1)], "counted from the first time");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (sharing, peers, now) = (Sharing::default(), [1, 2].map(peer), Instant::now());
        let all: Vec<Digest> = (0..=MOST_CHUNKS as u32).map(digest).collect();
        sharing.locate(NodeNumber(1), &peers, &all, now);
        for node in 1..20 {
            sharing.locate(NodeNumber(node), &peers, &all[1..2], now);
        }
        let known = sharing.0.lock().unwrap();
        assert_eq!((known.chunks.len(), known.order.len()), (MOST_CHUNKS, MOST_CHUNKS));
        assert!(!known.chunks.contains_key(&all[0]), "the oldest went");
        assert_eq!(known.chunks[&all[1]].len(), MOST_NODES);
    }
}
