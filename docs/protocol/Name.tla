-------------------------------- MODULE Name --------------------------------
(* A cluster name is one cluster's: two clusters, one name, one key that both *)
(* would write. Every transaction may be applied at any time after it was     *)
(* sent, or never.                                                            *)
EXTENDS Integers, FiniteSets
CONSTANTS Without, MaxTerm, MaxStop, MaxExpire, MaxHand
G(rule) == rule \notin Without
C == 1..2
Other(c) == 3 - c

VARIABLES owner, lead, leases, rec, \* etcd: a UID or 0; <<UID, nonce>>; UIDs with lease keys; UID in the record
          net, st, term, b, err     \* st: up, down, exited
vars == <<owner, lead, leases, rec, net, st, term, b, err>>

Init == /\ owner = 0 /\ lead = <<0, 0>> /\ leases = {} /\ rec = 0 /\ net = {}
        /\ st = [c \in C |-> "up"] /\ term = [c \in C |-> 0]
        /\ b = [term |-> 0, stop |-> 0, expire |-> 0, hand |-> 0] /\ err = {}

\* A leader puts the owner back that a hand took: its fence stands for "no leader".
Holds(c, t) == G("leader puts owner back") /\ t # 0 /\ lead = <<c, t>>

Send(m) == net' = net \cup {m} /\ m \notin net /\ UNCHANGED <<owner, lead, leases, rec, st, term, err>>

Claim(c) == st[c] = "up" /\ owner = 0 /\ Send([o |-> "owner", c |-> c, t |-> term[c]]) /\ UNCHANGED b
Stand(c) == st[c] = "up" /\ owner = c /\ lead[2] = 0 /\ b.term < MaxTerm
            /\ b' = [b EXCEPT !.term = @ + 1] /\ Send([o |-> "lead", c |-> c, t |-> b'.term])
Write(c) == st[c] = "up" /\ term[c] # 0 /\ rec # c
            /\ Send([o |-> "write", c |-> c, t |-> term[c]]) /\ UNCHANGED b

Apply(m) ==
  /\ net' = net \ {m} /\ UNCHANGED <<st, b>>
  /\ CASE m.o = "owner" ->
            /\ owner = 0 /\ st[m.c] # "exited"   \* it is put on a lease that only its sender keeps
            /\ G("no other leases") => leases \subseteq {m.c}
            /\ G("no leader") => lead[2] = 0 \/ Holds(m.c, m.t)
            /\ owner' = m.c
            /\ err' = IF Other(m.c) \in leases \/ lead[1] = Other(m.c) THEN err \cup {"taken"} ELSE err
            /\ UNCHANGED <<lead, leases, rec, term>>
       [] m.o = "lead" ->
            /\ lead[2] = 0
            /\ G("owner at election") => owner = m.c
            /\ lead' = <<m.c, m.t>>
            /\ term' = [term EXCEPT ![m.c] = IF st[m.c] = "up" THEN m.t ELSE 0]
            /\ UNCHANGED <<owner, leases, rec, err>>
       [] OTHER ->
            /\ lead = <<m.c, m.t>>
            /\ G("owner in the fence") => owner = m.c
            /\ leases' = leases \cup {m.c}
            /\ rec' = IF rec = 0 THEN m.c ELSE rec
            /\ err' = IF owner # m.c THEN err \cup {"not the owner"} ELSE err
            /\ UNCHANGED <<owner, lead, term>>
Lost(m) == net' = net \ {m} /\ UNCHANGED <<owner, lead, leases, rec, st, term, b, err>>

Deposed(c) == term[c] # 0 /\ lead # <<c, term[c]>> /\ term' = [term EXCEPT ![c] = 0]
              /\ UNCHANGED <<owner, lead, leases, rec, net, st, b, err>>
Exit(c) == st[c] = "up" /\ owner = Other(c) /\ st' = [st EXCEPT ![c] = "exited"] /\ term' = [term EXCEPT ![c] = 0]
           /\ UNCHANGED <<owner, lead, leases, rec, net, b, err>>
Stop(c) == st[c] = "up" /\ b.stop < MaxStop /\ b' = [b EXCEPT !.stop = @ + 1] /\ term' = [term EXCEPT ![c] = 0]
           /\ st' = [st EXCEPT ![c] = "down"] /\ UNCHANGED <<owner, lead, leases, rec, net, err>>
Start(c) == st[c] = "down" /\ st' = [st EXCEPT ![c] = "up"] /\ UNCHANGED <<owner, lead, leases, rec, net, term, b, err>>

\* A lease runs out when nobody keeps it; all do, in any order, once etcd was frozen (MaxExpire).
Expire ==
  /\ \/ UNCHANGED b
     \/ b.expire < MaxExpire /\ b' = [b EXCEPT !.expire = @ + 1]
  /\ LET Gone(c) == st[c] # "up" \/ b' # b IN
     \/ owner # 0 /\ Gone(owner) /\ owner' = 0 /\ UNCHANGED <<lead, leases, rec>>
     \/ lead[2] # 0 /\ lead' = <<0, 0>> /\ b' = b /\ UNCHANGED <<owner, leases, rec>>
     \/ \E c \in leases : Gone(c) /\ leases' = leases \ {c} /\ rec' = (IF rec = c THEN 0 ELSE rec)
                          /\ UNCHANGED <<owner, lead>>
  /\ UNCHANGED <<net, st, term, err>>
Hand == b.hand < MaxHand /\ b' = [b EXCEPT !.hand = @ + 1] /\ owner # 0 /\ owner' = 0
        /\ UNCHANGED <<lead, leases, rec, net, st, term, err>>

Next == \/ \E c \in C : Claim(c) \/ Stand(c) \/ Write(c) \/ Deposed(c) \/ Exit(c) \/ Stop(c) \/ Start(c)
        \/ \E m \in net : Apply(m) \/ Lost(m)
        \/ Expire \/ Hand
Spec == Init /\ [][Next]_vars

OwnerWrites == "not the owner" \notin err
NotTaken == "taken" \notin err           \* a name in use is not taken
OneCluster == leases # C                 \* never the leases of both
PutBack == \A c \in C : st[c] = "up" /\ owner = 0 /\ term[c] # 0 /\ lead = <<c, term[c]>>
                       => Holds(c, term[c]) \/ ~G("no leader")
OneWorks == \E c \in C : st[c] # "exited" \* the two never chase each other out
=============================================================================
