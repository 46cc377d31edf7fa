----------------------------- MODULE Registrar -----------------------------
(* The writing protocol of etcd-registrar:                                    *)
(* two processes, one etcd, one Kubernetes, up to two pods. Each rule that    *)
(* can be taken out has a name; those in Without are not in force. README.md  *)
(* says where each stands in the code, and what is left out. Ghosts (acted, before, err, rec[k].f, rec[k].v) are *)
(* read by the checks only.                                                   *)
EXTENDS Integers, Sequences, FiniteSets

CONSTANTS
  Layout,      \* how pods, addresses, keys and lanes lie; see below
  TwoWatches,  \* TRUE: records and lease keys reach the mirror out of order
  Without,     \* names of the rules taken out
  \* how often each thing may happen:
  MaxRV, MaxTerm, MaxCrash, MaxFreeze, MaxLost, MaxLease, MaxExpire,
  MaxHand, MaxNoSpace, MaxRestore

G(rule) == rule \notin Without

Pods  == 1..2
Procs == 1..2
KeyOf  == IF Layout = "onekey" THEN <<1, 1>> ELSE <<1, 2>>
AddrOf == IF Layout \in {"onekey", "oneaddr", "onelane"} THEN <<1, 1>> ELSE <<1, 2>>
LaneOf == IF Layout \in {"oneaddr", "lanes"} THEN <<1, 2>> ELSE <<1, 1>>
Keys   == {KeyOf[x] : x \in Pods}
Lanes  == {LaneOf[k] : k \in Keys}
Leases == 1..MaxLease
Foreign == 9

VARIABLES
  hs,      \* Kubernetes: the state of every pod at every resource version
  rec,     \* etcd: key -> x: pod, l: lease, n: version, c: version at creation
  lk,      \* etcd: the leases that have a key below leases/
  lst,     \* etcd: lease -> none, live, dead
  seen,    \* etcd: lane -> n: version, v: the mark, h: the key is there
  lt,      \* etcd: lease -> the term that granted it (in etcd: the create
           \* revision of its key below leases/ against that of the leader key)
  lead,    \* etcd: the nonce in the leader key; 0: none
  full,    \* etcd: NOSPACE
  net,     \* sent, and not (or never) applied; p = 0: nobody waits for it; ops: what
           \* is to be done at which keys, o: put, del or lk (the key of a lease)
  st,      \* process: up, down, frozen
  view,    \* process: the resource version that its watches have reached
  mir, mlk,\* process: its copies of rec and lk
  syn,     \* process: which copies have reached the revision of its election
  term,    \* process: the nonce of the term that it believes to hold, or 0
  okm,     \* process: the marks are reached
  own, rvk,\* process: leases of its term; leases for which it sent a revoke
  lane,    \* process, lane: idle, wait, unk, bar, read
  sm,      \* process, lane: mod_revision of the lane's seen key, as known
  saw,     \* process, key: create revision of what it saw under our lease
  b,       \* how much of each bound is used up
  snap,    \* what a restore brings back
  acted, before, err

etcd  == <<rec, lk, lst, lt, seen, lead, full>>
proc  == <<st, view, mir, mlk, syn, term, okm, own, rvk, lane, sm, saw>>
ghost == <<acted, before>>
vars  == <<hs, etcd, net, proc, b, snap, ghost, err>>

Max(S) == CHOOSE m \in S : \A n \in S : n <= m

-----------------------------------------------------------------------------
(* Kubernetes. A pod is 0 not there yet, 1 ready, 2 not ready, 3 gone.        *)

kv == Len(hs) - 1
S(x, v) == hs[v + 1][x]
Wanted(x, v) ==
  S(x, v) = 1 /\ \A y \in Pods : y > x /\ AddrOf[y] = AddrOf[x] => S(y, v) # 1
Want(k, v) ==
  IF \E x \in Pods : KeyOf[x] = k /\ Wanted(x, v)
  THEN CHOOSE x \in Pods : KeyOf[x] = k /\ Wanted(x, v) ELSE 0

KubeStep == \E x \in Pods, s \in 1..3 :
  /\ kv < MaxRV
  /\ <<S(x, kv), s>> \in {<<0, 1>>, <<1, 2>>, <<2, 1>>, <<1, 3>>, <<2, 3>>}
  /\ hs' = Append(hs, [hs[kv + 1] EXCEPT ![x] = s])
  /\ UNCHANGED <<etcd, net, proc, b, snap, ghost, err>>

-----------------------------------------------------------------------------
(* etcd *)

None(n) == [x |-> 0, l |-> 0, n |-> n, c |-> 0, f |-> FALSE, v |-> 0]
M(r)  == IF r.x = 0 THEN 0 ELSE r.n
SM(s) == IF s.h THEN s.n ELSE 0

\* A record whose pod was wanted at every version since the one it was put for.
Healthy(r) == r.x \in Pods /\ \A v \in r.v..kv : Wanted(r.x, v)

Kill(l, counts) ==
  /\ lst' = [lst EXCEPT ![l] = "dead"]
  /\ lk' = lk \ {l}
  /\ rec' = [k \in Keys |-> IF rec[k].x # 0 /\ rec[k].l = l
                            THEN None(rec[k].n + 1) ELSE rec[k]]
  /\ err' = IF counts /\ \E k \in Keys : rec[k].l = l /\ Healthy(rec[k])
            THEN err \cup {"lost"} ELSE err

Kept(l) == \E p \in Procs : st[p] = "up" /\ l \in mlk[p] \cup own[p]

At(m)     == {op.k : op \in m.ops}
Op(m, k)  == CHOOSE op \in m.ops : op.k = k
Leased(m) == {op.l : op \in {o \in m.ops : o.o \in {"put", "lk"}}}

\* What the checks say when transaction m changes etcd.
Faults(m) ==
  {e \in {"deposed", "returned", "lost", "foreign", "event"} :
    \/ e = "deposed" /\ m.t # lead
    \/ \E op \in m.ops : LET r == rec[op.k] IN
         CASE e = "returned" -> op.o = "put" /\ (\/ S(op.x, m.v) # 1
                                                 \/ S(op.x, acted[m.ln]) = 3
                                                 \/ S(op.x, before) = 3)
           [] e = "lost"     -> op.o \in {"put", "del"} /\ Healthy(r) /\ ~(op.o = "put" /\ op.x = r.x)
           [] e = "foreign"  -> op.o \in {"put", "del"} /\ r.x # 0 /\ r.f
           [] e = "event"    -> op.o = "put" /\ op.x = r.x /\ r.l \in lk
           [] OTHER          -> FALSE}

\* All keys of a transaction, or none.
Passes(m) ==
  /\ m.o = "bar" /\ G("barrier compares") => SM(seen[m.ln]) = m.s
  /\ m.o = "txn" /\ G("lane") => SM(seen[m.ln]) = m.s
  /\ \A op \in m.ops :
       /\ G("key") => M(rec[op.k]) = op.km
       /\ op.o \in {"put", "lk"} => lst[op.l] = "live"

Effect(m) ==
  /\ rec' = [k \in Keys |->
       IF k \notin At(m) THEN rec[k]
       ELSE LET op == Op(m, k)
                r == rec[k] IN
            CASE op.o = "put" -> [x |-> op.x, l |-> op.l, n |-> r.n + 1, v |-> m.v,
                                  c |-> IF r.x = 0 THEN r.n + 1 ELSE r.c, f |-> r.f]
              [] op.o = "del" -> None(r.n + 1)
              [] OTHER -> r]
  /\ lk' = lk \cup Leased(m)
  /\ seen' = IF m.o # "rem"
             THEN [seen EXCEPT ![m.ln] = [n |-> @.n + 1, v |-> m.v, h |-> TRUE]]
             ELSE IF G("removal deletes mark")
             THEN [seen EXCEPT ![m.ln] = [n |-> @.n + 1, v |-> 0, h |-> FALSE]]
             ELSE seen
  /\ acted' = [acted EXCEPT ![m.ln] = Max({@, m.v})]
  /\ err' = err \cup Faults(m)
  /\ UNCHANGED <<lst, lt, lead, full>>

Idle(p, ln, n) == IF n = 0 /\ G("no absent mark") THEN "unk" ELSE "idle"

\* What the sender makes of the answer.
Answer(m, ok) == LET p == m.p IN
  IF p = 0 THEN UNCHANGED proc ELSE
  /\ sm' = [sm EXCEPT ![p][m.ln] = SM(seen'[m.ln])]
  /\ lane' = [lane EXCEPT ![p][m.ln] =
       CASE m.o = "bar" /\ ~ok -> "unk"
         [] m.o = "bar" /\ ok /\ G("read") -> "read"
         [] OTHER -> IF m.w THEN "unk" ELSE Idle(p, m.ln, SM(seen'[m.ln]))]
  \* Done, or read by the transaction that failed.
  /\ mir' = [mir EXCEPT ![p] = [k \in Keys |-> IF k \in At(m) THEN rec'[k] ELSE @[k]]]
  /\ mlk' = IF ok THEN [mlk EXCEPT ![p] = @ \cup Leased(m)] ELSE mlk
  /\ own' = IF ok THEN own ELSE [own EXCEPT ![p] = @ \ {l \in Leased(m) : lst[l] # "live"}]
  /\ saw' = IF ok /\ MaxHand > 0
            THEN [saw EXCEPT ![p] = [k \in Keys |-> IF k \in At(m) /\ Op(m, k).o = "put" THEN rec'[k].c ELSE @[k]]]
            ELSE saw
  /\ UNCHANGED <<st, view, syn, term, okm, rvk>>

\* etcd takes a message up, or never does. One that would fail and that nobody
\* waits for stays in net, as if lost.
Apply(m) ==
  /\ m.o # "rev"
  /\ G("fence") => m.t = lead
  /\ full => m.o = "rem"
  /\ m.p = 0 => Passes(m)
  /\ net' = net \ {m}
  /\ IF Passes(m) THEN Effect(m) ELSE UNCHANGED <<etcd, acted, err>>
  /\ Answer(m, Passes(m))
  /\ UNCHANGED <<hs, b, snap, before>>

ApplyRevoke(m) ==
  /\ m.o = "rev"
  /\ net' = net \ {m}
  /\ IF lst[m.l] = "live" THEN Kill(m.l, TRUE) ELSE UNCHANGED <<lst, lk, rec, err>>
  /\ UNCHANGED <<hs, lt, seen, lead, full, proc, b, snap, ghost>>

-----------------------------------------------------------------------------
(* A process: its copies, its term *)

Saw(p, r2, l2) ==
  IF MaxHand = 0 THEN saw[p]
  ELSE [k \in Keys |-> IF r2[k].x # 0 /\ r2[k].l \in l2 THEN r2[k].c ELSE saw[p][k]]

Watch(p) == st[p] = "up" /\ \E what \in
    (IF TwoWatches THEN {{"rec"}, {"lk"}} ELSE {{"rec", "lk"}}) :
  /\ \/ "rec" \in what /\ mir[p] # rec
     \/ "lk" \in what /\ mlk[p] # lk
     \/ ~ (what \subseteq syn[p])
  /\ mir' = IF "rec" \in what THEN [mir EXCEPT ![p] = rec] ELSE mir
  /\ mlk' = IF "lk" \in what THEN [mlk EXCEPT ![p] = lk] ELSE mlk
  /\ syn' = [syn EXCEPT ![p] = @ \cup what]
  /\ saw' = [saw EXCEPT ![p] = Saw(p, mir'[p], mlk'[p])]
  \* All was read anew since the restore: the marks, too, and who leads (else it is Deposed first).
  /\ LET anew == /\ b.restore > 0 /\ G("read anew") /\ term[p] # 0
                 /\ syn[p] # {"rec", "lk"} /\ syn'[p] = {"rec", "lk"} IN
     /\ anew => term[p] = lead
     /\ sm' = IF anew THEN [sm EXCEPT ![p] = [ln \in Lanes |-> SM(seen[ln])]] ELSE sm
     /\ lane' = IF anew
                THEN [lane EXCEPT ![p] = [ln \in Lanes |->
                       IF @[ln] = "idle" THEN Idle(p, ln, SM(seen[ln])) ELSE @[ln]]]
                ELSE lane
  /\ UNCHANGED <<hs, etcd, net, st, view, term, okm, own, rvk, b, snap, ghost, err>>

KubeWatch(p) ==
  /\ st[p] = "up" /\ view[p] < kv
  /\ view' = [view EXCEPT ![p] = @ + 1]
  /\ UNCHANGED <<hs, etcd, net, st, mir, mlk, syn, term, okm, own, rvk, lane, sm, saw, b, snap, ghost, err>>

\* The marks that a new leader finds: are they reached without a list?
Reached(p) ==
  IF \A ln \in Lanes : seen[ln].h
  THEN \A ln \in Lanes : seen[ln].v <= view[p]
  ELSE /\ ~ G("list for a missing mark")
       /\ \A ln \in Lanes : seen[ln].h => seen[ln].v <= view[p]
       /\ \A k \in Keys : rec[k].x # 0 => rec[k].l \notin lk

Elect(p) ==
  /\ st[p] = "up" /\ term[p] = 0 /\ lead = 0 /\ ~full /\ b.term < MaxTerm
  /\ lead' = b.term + 1
  /\ b' = [b EXCEPT !.term = @ + 1]
  /\ term' = [term EXCEPT ![p] = lead']
  /\ okm' = [okm EXCEPT ![p] = ~G("mark") \/ Reached(p)]
  /\ sm' = [sm EXCEPT ![p] = [ln \in Lanes |-> SM(seen[ln])]]
  /\ lane' = [lane EXCEPT ![p] = [ln \in Lanes |-> Idle(p, ln, SM(seen[ln]))]]
  /\ syn' = [syn EXCEPT ![p] = (IF mir[p] = rec THEN {"rec"} ELSE {})
                               \cup (IF mlk[p] = lk THEN {"lk"} ELSE {})]
  /\ own' = [own EXCEPT ![p] = {}]
  /\ before' = Max({acted[ln] : ln \in Lanes})
  /\ UNCHANGED <<hs, rec, lk, lst, lt, seen, full, net, st, view, mir, mlk, rvk, saw, snap, acted, err>>

\* A list without a resource version: consistent.
List(p) ==
  /\ st[p] = "up" /\ term[p] # 0 /\ ~okm[p]
  /\ view' = [view EXCEPT ![p] = kv]
  /\ okm' = [okm EXCEPT ![p] = TRUE]
  /\ UNCHANGED <<hs, etcd, net, st, mir, mlk, syn, term, own, rvk, lane, sm, saw, b, snap, ghost, err>>

Forget(p, memory) ==   \* what is left of a term; with memory: of a process
  /\ term' = [term EXCEPT ![p] = 0]
  /\ okm' = [okm EXCEPT ![p] = FALSE]
  /\ own' = [own EXCEPT ![p] = {}]
  /\ rvk' = [rvk EXCEPT ![p] = IF memory \/ G("own term") THEN {} ELSE @]
  /\ lane' = [lane EXCEPT ![p] = [ln \in Lanes |-> "idle"]]
  /\ sm' = [sm EXCEPT ![p] = [ln \in Lanes |-> 0]]
  /\ syn' = [syn EXCEPT ![p] = {}]
  /\ net' = {m \in net : m.p # p} \cup
            {[m EXCEPT !.p = 0] : m \in {m \in net : m.p = p /\ (~G("fence") \/ m.t = lead)}}

Deposed(p) ==
  /\ st[p] = "up" /\ term[p] # 0 /\ term[p] # lead
  /\ Forget(p, FALSE)
  /\ UNCHANGED <<hs, etcd, st, view, mir, mlk, saw, b, snap, ghost, err>>

-----------------------------------------------------------------------------
(* The leader: what it sends *)

Leads(p) == st[p] = "up" /\ term[p] # 0 /\ okm[p]
            /\ (G("mirror") => syn[p] = {"rec", "lk"})

Ours(p, k) == LET r == mir[p][k] IN
  r.x # 0 /\ \/ r.l \in mlk[p]
             \/ G("own lease") /\ r.l \in own[p]
             \/ saw[p][k] # 0 /\ saw[p][k] = r.c
             \/ ~G("ours")

Need(p, k) == LET r == mir[p][k]
                  w == Want(k, view[p]) IN
  CASE w = 0 /\ Ours(p, k) -> "del"
    [] w # 0 /\ r.x = 0 -> "put"
    [] w # 0 /\ Ours(p, k) /\ (r.x # w \/ r.l = 0) -> "put"
    [] w # 0 /\ Ours(p, k) /\ r.x = w /\ r.l # 0 /\ r.l \notin mlk[p] -> "lk"
    [] OTHER -> "no"

AddrFree(p, k, w) ==
  \A x \in Pods : x # w /\ AddrOf[x] = AddrOf[w] /\ KeyOf[x] # k =>
    /\ G("address") => ~ (mir[p][KeyOf[x]].x = x /\ Ours(p, KeyOf[x]))
    /\ G("address in flight") =>
         /\ \A m \in net : ~ (m.p = p /\ \E op \in m.ops : op.o = "put" /\ op.x = x)
         /\ lane[p][LaneOf[KeyOf[x]]] \in {"idle", "wait"}

Usable(p) ==
  (IF G("own term") THEN own[p] ELSE own[p] \cup mlk[p])
  \ (IF G("revoked") THEN rvk[p] ELSE {})

Msg(p, o, ln) == [o |-> o, p |-> p, t |-> term[p], ln |-> ln, s |-> sm[p][ln], v |-> view[p],
                  ops |-> {}, l |-> 0, w |-> FALSE]

Send(p, m) ==
  /\ net' = net \cup {m}
  /\ lane' = [lane EXCEPT ![p][m.ln] = IF m.o = "bar" THEN "bar" ELSE "wait"]
  /\ UNCHANGED <<hs, etcd, st, view, mir, mlk, syn, term, okm, own, rvk, sm, saw, b, snap, ghost, err>>

\* What a key needs, as part of a transaction; a record that is put goes on lease l.
Part(p, k, l) ==
  [o |-> Need(p, k), k |-> k, km |-> M(mir[p][k]),
   x |-> IF Need(p, k) = "put" THEN Want(k, view[p]) ELSE 0,
   l |-> CASE Need(p, k) = "put" -> l [] Need(p, k) = "lk" -> mir[p][k].l [] OTHER -> 0]

\* One transaction for some of the keys of a lane that need something.
Write(p, ks) == \E ln \in Lanes :
  LET puts == {k \in ks : Need(p, k) = "put"} IN
  /\ Leads(p) /\ lane[p][ln] = "idle"
  /\ \A k \in ks : LaneOf[k] = ln /\ Need(p, k) # "no"
  /\ \A k \in puts : AddrFree(p, k, Want(k, view[p]))
  /\ \E l \in IF puts = {} THEN {0} ELSE Usable(p) :
       Send(p, [Msg(p, "txn", ln) EXCEPT !.ops = {Part(p, k, l) : k \in ks}])
SomeWrite(p) == \E ks \in SUBSET Keys \ {{}} : Write(p, ks)

\* NOSPACE: a removal goes alone, whatever the lane is waiting for.
Remove(p, k) == LET ln == LaneOf[k] IN
  /\ full /\ Leads(p) /\ lane[p][ln] \in {"idle", "unk"} /\ Need(p, k) = "del"
  /\ Send(p, [Msg(p, "rem", ln) EXCEPT !.ops = {Part(p, k, 0)}, !.w = (lane[p][ln] = "unk")])

Grant(p) ==
  /\ Leads(p) /\ Usable(p) = {} /\ b.lease < MaxLease
  /\ \E k \in Keys : Need(p, k) = "put"
  /\ b' = [b EXCEPT !.lease = @ + 1]
  /\ lst' = [lst EXCEPT ![b'.lease] = "live"]
  /\ lt' = [lt EXCEPT ![b'.lease] = term[p]]
  /\ own' = [own EXCEPT ![p] = @ \cup {b'.lease}]
  /\ UNCHANGED <<hs, rec, lk, seen, lead, full, net, st, view, mir, mlk, syn, term, okm, rvk, lane, sm, saw, snap, ghost, err>>

Revoke(p) == \E l \in mlk[p] :
  LET m == [Msg(p, "rev", CHOOSE ln \in Lanes : TRUE) EXCEPT !.p = 0, !.t = 0, !.s = 0, !.v = 0, !.l = l] IN
  /\ Leads(p) /\ m \notin net
  /\ \A k \in Keys : mir[p][k].l # l
  /\ G("older") => lt[l] <= term[p]
  /\ G("empty in flight") =>
       /\ \A n \in net : ~ (n.p = p /\ l \in Leased(n))
       /\ \A ln \in Lanes : lane[p][ln] \in {"idle", "wait"}
  /\ net' = net \cup {m}
  /\ own' = IF G("revoked") THEN [own EXCEPT ![p] = @ \ {l}] ELSE own
  /\ rvk' = [rvk EXCEPT ![p] = @ \cup {l}]
  /\ UNCHANGED <<hs, etcd, st, view, mir, mlk, syn, term, okm, lane, sm, saw, b, snap, ghost, err>>

Barrier(p, ln) ==
  /\ st[p] = "up" /\ term[p] # 0 /\ okm[p] /\ lane[p][ln] = "unk"
  /\ IF G("barrier") THEN Send(p, Msg(p, "bar", ln))
     ELSE /\ lane' = [lane EXCEPT ![p][ln] = "read"]
          /\ UNCHANGED <<hs, etcd, net, st, view, mir, mlk, syn, term, okm, own, rvk, sm, saw, b, snap, ghost, err>>

Read(p, ln) ==
  /\ st[p] = "up" /\ term[p] # 0 /\ lane[p][ln] = "read"
  /\ lane' = [lane EXCEPT ![p][ln] = Idle(p, ln, SM(seen[ln]))]
  /\ sm' = [sm EXCEPT ![p][ln] = SM(seen[ln])]
  /\ mir' = [mir EXCEPT ![p] = [k \in Keys |-> IF LaneOf[k] = ln THEN rec[k] ELSE @[k]]]
  /\ UNCHANGED <<hs, etcd, net, st, view, mlk, syn, term, okm, own, rvk, saw, b, snap, ghost, err>>

\* The sender gives up; etcd may still apply it, whenever it likes.
GiveUp(m) ==
  /\ m.p # 0 /\ b.lost < MaxLost
  /\ b' = [b EXCEPT !.lost = @ + 1]
  /\ net' = (net \ {m}) \cup {[m EXCEPT !.p = 0]}
  /\ lane' = [lane EXCEPT ![m.p][m.ln] = "unk"]
  /\ UNCHANGED <<hs, etcd, st, view, mir, mlk, syn, term, okm, own, rvk, sm, saw, snap, ghost, err>>

-----------------------------------------------------------------------------
(* What goes wrong *)

LeaderExpires ==   \* partition, pause, crash, hand-over, a hand: all the same here
  /\ lead # 0 /\ b.term < MaxTerm
  /\ lead' = 0
  /\ net' = IF G("fence") THEN {m \in net : m.o = "rev"} ELSE net
  /\ UNCHANGED <<hs, rec, lk, lst, lt, seen, full, proc, b, snap, ghost, err>>

Crash(p) ==
  /\ st[p] # "down" /\ b.crash < MaxCrash
  /\ b' = [b EXCEPT !.crash = @ + 1]
  /\ st' = [st EXCEPT ![p] = "down"]
  /\ Forget(p, TRUE)
  /\ saw' = [saw EXCEPT ![p] = [k \in Keys |-> 0]]
  /\ mir' = [mir EXCEPT ![p] = [k \in Keys |-> None(0)]]
  /\ mlk' = [mlk EXCEPT ![p] = {}]
  /\ view' = [view EXCEPT ![p] = 0]
  /\ UNCHANGED <<hs, etcd, snap, ghost, err>>

Start(p) ==
  /\ st[p] = "down"
  /\ st' = [st EXCEPT ![p] = "up"]
  /\ view' = [view EXCEPT ![p] = kv]
  /\ mir' = [mir EXCEPT ![p] = rec]
  /\ mlk' = [mlk EXCEPT ![p] = lk]
  /\ saw' = [saw EXCEPT ![p] = Saw(p, rec, lk)]
  /\ UNCHANGED <<hs, etcd, net, syn, term, okm, own, rvk, lane, sm, b, snap, ghost, err>>

Freeze(p) ==
  /\ st[p] = "up" /\ b.freeze < MaxFreeze
  /\ b' = [b EXCEPT !.freeze = @ + 1]
  /\ st' = [st EXCEPT ![p] = "frozen"]
  /\ UNCHANGED <<hs, etcd, net, view, mir, mlk, syn, term, okm, own, rvk, lane, sm, saw, snap, ghost, err>>

Thaw(p) ==
  /\ st[p] = "frozen"
  /\ st' = [st EXCEPT ![p] = "up"]
  /\ UNCHANGED <<hs, etcd, net, view, mir, mlk, syn, term, okm, own, rvk, lane, sm, saw, b, snap, ghost, err>>

Expire(l) ==
  /\ lst[l] = "live" /\ ~Kept(l) /\ b.expire < MaxExpire
  /\ b' = [b EXCEPT !.expire = @ + 1]
  /\ Kill(l, FALSE)
  /\ UNCHANGED <<hs, lt, seen, lead, full, net, proc, snap, ghost>>

ExpireOwner ==   \* with it, the marks
  /\ \A p \in Procs : st[p] # "up"
  /\ b.expire < MaxExpire /\ \E ln \in Lanes : seen[ln].h
  /\ b' = [b EXCEPT !.expire = @ + 1]
  /\ seen' = [ln \in Lanes |-> [seen[ln] EXCEPT !.h = FALSE, !.v = 0]]
  /\ lead' = 0
  /\ UNCHANGED <<hs, rec, lk, lst, lt, full, net, proc, snap, ghost, err>>

Hand == b.hand < MaxHand /\ b' = [b EXCEPT !.hand = @ + 1] /\
  /\ \/ \E k \in Keys :
          /\ \/ rec[k].x # 0 /\ rec' = [rec EXCEPT ![k] = None(@.n + 1)]
             \/ rec' = [rec EXCEPT ![k] = [x |-> Foreign, l |-> 0, n |-> @.n + 1, v |-> 0,
                   c |-> IF @.x = 0 THEN @.n + 1 ELSE @.c, f |-> IF @.x = 0 THEN TRUE ELSE @.f]]
          /\ UNCHANGED <<lk, seen>>
     \/ \E l \in lk : lk' = lk \ {l} /\ UNCHANGED <<rec, seen>>
     \/ \E ln \in Lanes : seen[ln].h /\ seen' = [seen EXCEPT ![ln].h = FALSE, ![ln].v = 0]
                          /\ UNCHANGED <<rec, lk>>
  /\ UNCHANGED <<hs, lst, lt, lead, full, net, proc, snap, ghost, err>>

NoSpace ==
  /\ full \/ b.full < MaxNoSpace
  /\ full' = ~full
  /\ b' = IF full THEN b ELSE [b EXCEPT !.full = @ + 1]
  /\ UNCHANGED <<hs, rec, lk, lst, lt, seen, lead, net, proc, snap, ghost, err>>

Save ==
  /\ MaxRestore > 0 /\ snap = <<>>
  /\ snap' = <<rec, lk, lst, seen, lead>>
  /\ UNCHANGED <<hs, etcd, net, proc, b, ghost, err>>

Restore ==   \* connections break: nothing sent before is applied after
  /\ snap # <<>> /\ b.restore < MaxRestore
  /\ b' = [b EXCEPT !.restore = @ + 1]
  /\ rec' = snap[1] /\ lk' = snap[2] /\ lst' = snap[3] /\ seen' = snap[4] /\ lead' = snap[5]
  /\ net' = {}
  /\ lane' = [p \in Procs |-> [ln \in Lanes |->
                IF lane[p][ln] \in {"wait", "bar"} THEN "unk" ELSE lane[p][ln]]]
  \* the marks are what was restored: S2 is meant relative to them
  /\ acted' = [ln \in Lanes |-> snap[4][ln].v]
  /\ before' = Max({acted'[ln] : ln \in Lanes})
  \* What a process knows is of another etcd, and it leads still, if the leader key is one of its own.
  /\ syn' = IF G("read anew") THEN [p \in Procs |-> {}] ELSE syn
  /\ UNCHANGED <<hs, lt, full, st, view, mir, mlk, term, okm, own, rvk, sm, saw, snap, err>>

-----------------------------------------------------------------------------
\* One pod is ready and its record stands, on a lease of the first term.
Init ==
  LET one == [k \in Keys |-> IF k = KeyOf[1]
                THEN [x |-> 1, l |-> 1, n |-> 1, c |-> 1, f |-> FALSE, v |-> 1] ELSE None(0)] IN
  /\ hs = <<<<0, 0>>, <<1, 0>>>>
  /\ rec = one /\ lk = {1} /\ lst = [l \in Leases |-> IF l = 1 THEN "live" ELSE "none"]
  /\ seen = [ln \in Lanes |-> [n |-> 1, v |-> 1, h |-> TRUE]]
  /\ lt = [l \in Leases |-> IF l = 1 THEN 1 ELSE 0]
  /\ lead = 1 /\ full = FALSE /\ net = {}
  /\ st = [p \in Procs |-> "up"] /\ view = [p \in Procs |-> 1]
  /\ mir = [p \in Procs |-> one] /\ mlk = [p \in Procs |-> {1}]
  /\ term = [p \in Procs |-> IF p = 1 THEN 1 ELSE 0]
  /\ syn = [p \in Procs |-> IF p = 1 THEN {"rec", "lk"} ELSE {}]
  /\ okm = [p \in Procs |-> p = 1]
  /\ own = [p \in Procs |-> IF p = 1 THEN {1} ELSE {}]
  /\ rvk = [p \in Procs |-> {}]
  /\ lane = [p \in Procs |-> [ln \in Lanes |-> "idle"]]
  /\ sm = [p \in Procs |-> [ln \in Lanes |-> IF p = 1 THEN 1 ELSE 0]]
  /\ saw = [p \in Procs |-> [k \in Keys |-> IF MaxHand > 0 THEN one[k].c ELSE 0]]
  /\ b = [term |-> 1, crash |-> 0, freeze |-> 0, lost |-> 0, lease |-> 1, expire |-> 0,
          hand |-> 0, full |-> 0, restore |-> 0]
  /\ snap = <<>>
  /\ acted = [ln \in Lanes |-> 1] /\ before = 0 /\ err = {}

\* For a configuration in which hands reach the marks only.
HandsOnMarks == b'.hand # b.hand => rec' = rec /\ lk' = lk

Works ==   \* what goes on without faults
  \/ \E m \in net : Apply(m) \/ ApplyRevoke(m)
  \/ \E p \in Procs :
       \/ Watch(p) \/ KubeWatch(p) \/ Elect(p) \/ List(p) \/ Deposed(p) \/ Start(p) \/ Thaw(p)
       \/ Grant(p) \/ Revoke(p)
       \/ SomeWrite(p) \/ \E k \in Keys : Remove(p, k)
       \/ \E ln \in Lanes : Barrier(p, ln) \/ Read(p, ln)

Breaks ==
  \/ KubeStep \/ LeaderExpires \/ ExpireOwner \/ Hand \/ NoSpace \/ Save \/ Restore
  \/ \E m \in net : GiveUp(m)
  \/ \E p \in Procs : Crash(p) \/ Freeze(p)
  \/ \E l \in Leases : Expire(l)

Next == Works \/ Breaks
Spec == Init /\ [][Next]_vars
Fair == Spec
  /\ WF_vars(\E m \in net : m.p # 0 /\ Apply(m))
  /\ \A p \in Procs :
       /\ WF_vars(Watch(p)) /\ WF_vars(KubeWatch(p)) /\ WF_vars(Deposed(p)) /\ WF_vars(Elect(p))
       /\ WF_vars(List(p)) /\ WF_vars(Grant(p)) /\ WF_vars(Start(p)) /\ WF_vars(Thaw(p))
       /\ WF_vars(SomeWrite(p))
       /\ WF_vars(\E ln \in Lanes : Barrier(p, ln) \/ Read(p, ln))

-----------------------------------------------------------------------------
(* What must hold *)

S1 == "deposed" \notin err     \* a deposed leader changes nothing
S2 == "returned" \notin err    \* no record for a pod that was not ready, or had left at what was acted on
S7 == "foreign" \notin err     \* no foreign key is touched
NeverLost == "lost" \notin err \* no record goes whose pod stayed ready
NoEvent == "event" \notin err  \* no record is put that stands already
OneOwner == \A k1, k2 \in Keys : rec[k1].x \in Pods /\ rec[k2].x \in Pods /\ rec[k1].x # rec[k2].x
                                 => AddrOf[rec[k1].x] # AddrOf[rec[k2].x]
HasLease == \A k \in Keys : rec[k].x \in Pods => lst[rec[k].l] = "live"   \* S4

\* L1: a leader that knows everything and has nothing to do has done everything.
AtRest(p) ==
  /\ Leads(p) /\ term[p] = lead /\ ~full
  /\ view[p] = kv /\ mir[p] = rec /\ mlk[p] = lk
  /\ \A ln \in Lanes : lane[p][ln] = "idle"
  /\ \A k \in Keys : Need(p, k) = "no" \/ (Need(p, k) = "put" /\ Usable(p) # {} /\ ~AddrFree(p, k, Want(k, kv)))
Right(k) == \/ rec[k].x = Want(k, kv) /\ (rec[k].x # 0 => rec[k].l \in lk)
            \/ rec[k].x = Foreign
            \/ rec[k].x # 0 /\ MaxHand > 0 /\ rec[k].l \notin lk   \* a hand took its lease key, and then its process died
L1 == \A p \in Procs : AtRest(p) => \A k \in Keys : Right(k)

\* L1 once more, as what must come to be when every process goes on.
Converges == <>[](\A k \in Keys : rec[k].x = Want(k, kv))
=============================================================================
