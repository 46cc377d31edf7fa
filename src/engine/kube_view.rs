//! How far the watches of Kubernetes are, and whether this replica is live.
//!
//! Takes what the watches say of themselves, gives completeness, liveness and marks. Must never read a
//! clock: the time comes in.

use serde::{Deserialize, Serialize};

use super::io::{Resource, WatchProblem};

/// A replica is live while the API server answered within the last 15 s (design, section 2).
pub const LIVE_MICROS: u64 = 15_000_000;

/// A list that is older than what was seen is asked for again; when it comes out so as often in a
/// row, Kubernetes was restored from a backup.
const OLDER_LISTS_MEAN_RESTORE: u8 = 3;

/// How much of Kubernetes the writes so far were based on; the value of a `seen` key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The newest resource version of pods.
    pub pods: u64,
    /// The newest resource version of registrations.
    pub registrations: u64,
}

impl Mark {
    /// The higher of both, member by member.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            pods: self.pods.max(other.pods),
            registrations: self.registrations.max(other.registrations),
        }
    }
}

/// One watch.
#[derive(Clone, Debug, Default)]
pub struct WatchView {
    /// The newest resource version that it has reached.
    pub version: u64,
    /// Whether it has delivered a complete list.
    pub complete: bool,
    /// Since when it is broken, and how.
    pub broken: Option<(u64, WatchProblem, String)>,
    /// The epoch of the list that is under way.
    pub listing: Option<u32>,
    /// The number of the newest relist asked for.
    pub asked: u64,
    /// The relist that the list under way has taken up.
    pub listing_relist: u64,
    /// The newest relist that was answered.
    pub answered: u64,
    /// The newest object that the list under way has shown and that counts already.
    shown: u64,
    older_lists: u8,
    /// Objects count although they are older than what is known: Kubernetes was restored.
    pub older_too: bool,
}

/// What the end of a list means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListEnd {
    /// It counts.
    Counts,
    /// It is older than what was seen and is discarded: list anew.
    Older,
    /// It is older again and again: Kubernetes was restored from a backup. It counts.
    Restored,
}

impl WatchView {
    /// A list begins.
    pub fn begin_list(&mut self, epoch: u32, relist: u64) {
        self.break_off();
        self.listing = Some(epoch);
        self.listing_relist = relist;
    }

    /// An object of the list under way counts before its end. (Its end may name an older version: that of the
    /// namespace that was listed first.)
    pub fn show(&mut self, version: u64) {
        self.shown = self.shown.max(version);
    }

    /// The list under way, if any, won't come to its end: what it has shown was seen, and a list that is older does not
    /// count.
    pub fn break_off(&mut self) {
        if self.listing.take().is_some() {
            self.advance(self.shown);
        }
        self.shown = 0;
    }

    /// A list ended at a resource version.
    pub fn end_list(&mut self, version: u64) -> ListEnd {
        self.listing = None;
        self.shown = 0;
        self.broken = None;
        let restored = self.older_too;
        if version < self.version && !restored {
            self.older_lists += 1;
            // The next one shows whether it stays so; it is then taken whole.
            self.older_too = self.older_lists + 1 >= OLDER_LISTS_MEAN_RESTORE;
            return ListEnd::Older;
        }
        let went_back = version < self.version;
        self.older_lists = 0;
        self.older_too = false;
        self.version = version;
        self.complete = true;
        self.answered = self.listing_relist;
        if went_back {
            ListEnd::Restored
        } else {
            ListEnd::Counts
        }
    }

    /// Something at a resource version was delivered.
    pub fn advance(&mut self, version: u64) {
        self.version = self.version.max(version);
    }

    /// The watch says that it works, at a resource version. (A change does not say so: it may come from another
    /// namespace than the one that can't be watched.)
    pub fn bookmark(&mut self, version: u64) {
        self.broken = None;
        self.advance(version);
    }
}

/// All watches.
#[derive(Clone, Debug, Default)]
pub struct KubeView {
    /// Pods.
    pub pods: WatchView,
    /// Nodes.
    pub nodes: WatchView,
    /// Registrations.
    pub registrations: WatchView,
    /// When the API server answered last.
    pub heard: Option<u64>,
}

impl KubeView {
    /// The watch of a resource.
    pub fn of(&mut self, resource: Resource) -> &mut WatchView {
        match resource {
            Resource::Pods => &mut self.pods,
            Resource::Nodes => &mut self.nodes,
            Resource::Registrations => &mut self.registrations,
        }
    }

    /// All three.
    #[must_use]
    pub fn all(&self) -> [(Resource, &WatchView); 3] {
        [
            (Resource::Pods, &self.pods),
            (Resource::Nodes, &self.nodes),
            (Resource::Registrations, &self.registrations),
        ]
    }

    /// Whether every watch has delivered a complete list.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.all().iter().all(|(_, watch)| watch.complete)
    }

    /// Whether this replica is live.
    #[must_use]
    pub fn live(&self, now: u64) -> bool {
        let recent = |at: u64| now.saturating_sub(at) < LIVE_MICROS;
        self.complete()
            && self.heard.is_some_and(recent)
            && self.all().iter().all(|(_, watch)| {
                watch
                    .broken
                    .as_ref()
                    .is_none_or(|(since, ..)| recent(*since))
            })
    }

    /// How much of Kubernetes the index knows.
    #[must_use]
    pub fn mark(&self) -> Mark {
        Mark {
            pods: self.pods.version,
            registrations: self.registrations.version,
        }
    }
}
