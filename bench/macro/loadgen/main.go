// One load generator for etcd (clientv3) and for a node's bulk door, so that both are asked by the same code.
//
// Closed loop: each client sends, waits for its answer, sends again. Clients share min(clients, 8) connections, and
// connections are spread over the targets. After a warm-up, operations are counted for the duration; then every client
// reads back the last thing it wrote, so that answers without effect cannot pass for work done. One JSON object is
// printed: counts, latency percentiles, and every gap between two successes of anybody that was longer than 20 ms.
//
//	loadgen -system etcd -targets http://127.0.0.1:2379,... -clients 64
//	loadgen -system bulk -targets /path/bulk.sock,... -clients 64 -accounts FILE [-signed -network HEX]
//
// Built with Debian's golang-go and golang-etcd-server-dev in GOPATH mode (see bench/macro/state_network.py).
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"math/rand"
	"os"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Longer gaps than this are told one by one; shorter ones are ordinary.
const gapMin = 20 * time.Millisecond
const gapCountMax = 2000

// What one client asks of a system. Not shared between goroutines.
type client interface {
	// put writes a value; the key belongs to this client alone.
	put(key int, value []byte) error
	// get reads it back, at the level at which put answered.
	get(key int) ([]byte, error)
	// claim takes a key that nobody holds; `number` is unique in this run.
	claim(number int64) error
	// holds tells whether the claim is really this client's.
	holds(number int64) (bool, error)
}

type options struct {
	system, op           string
	targets              []string
	clients, connections int
	keys, valueSize      int
	warmUp, duration     time.Duration
	timeout              time.Duration
	signed               bool
	level                uint64
	network, accounts    string
}

type result struct {
	System      string         `json:"system"`
	Op          string         `json:"op"`
	Clients     int            `json:"clients"`
	Connections int            `json:"connections"`
	Count       int            `json:"count"`
	Seconds     float64        `json:"seconds"`
	PerS        float64        `json:"per_s"`
	P50Ms       float64        `json:"p50_ms"`
	P99Ms       float64        `json:"p99_ms"`
	MaxMs       float64        `json:"max_ms"`
	ErrorCount  int64          `json:"error_count"`
	Errors      map[string]int `json:"errors"`
	// Clients whose last write could be read back as it was written, and those whose could not.
	VerifiedCount int `json:"verified_count"`
	WrongCount    int `json:"wrong_count"`
	// [Unix ms at which the gap began, its length in ms], in order.
	Gaps [][2]float64 `json:"gaps"`
}

func main() {
	var o options
	var targets string
	flag.StringVar(&o.system, "system", "", "etcd or bulk")
	flag.StringVar(&targets, "targets", "", "comma-separated URLs (etcd) or socket paths (bulk)")
	flag.StringVar(&o.op, "op", "put", "put or claim")
	flag.IntVar(&o.clients, "clients", 64, "")
	flag.IntVar(&o.connections, "connections", 8, "at most; never more than clients")
	flag.IntVar(&o.keys, "keys", 1000000, "distinct keys, shared out among the clients")
	flag.IntVar(&o.valueSize, "value-size", 256, "bytes")
	flag.DurationVar(&o.warmUp, "warm-up", 2*time.Second, "")
	flag.DurationVar(&o.duration, "duration", 8*time.Second, "")
	flag.DurationVar(&o.timeout, "timeout", 10*time.Second, "after which an operation counts as failed")
	flag.Uint64Var(&o.level, "level", 1, "bulk: level of puts: 0 observed, 1 certified, 2 final")
	flag.BoolVar(&o.signed, "signed", false, "bulk: every operation is an intent signed by its account")
	flag.StringVar(&o.network, "network", "", "bulk, signed: network id in hex")
	flag.StringVar(&o.accounts, "accounts", "", "bulk: file with a JSON array of {\"account_id\", \"seed\" in hex}")
	flag.Parse()
	o.targets = strings.Split(targets, ",")
	if o.connections > o.clients {
		o.connections = o.clients
	}
	if (o.op != "put" && o.op != "claim") || targets == "" || o.clients < 1 || o.keys < o.clients || o.valueSize < 8 {
		fail(fmt.Errorf("bad flags; see -help"))
	}
	clients, err := connect(&o)
	if err != nil {
		fail(err)
	}
	encoder := json.NewEncoder(os.Stdout)
	if err := encoder.Encode(run(&o, clients)); err != nil {
		fail(err)
	}
}

func connect(o *options) ([]client, error) {
	switch o.system {
	case "etcd":
		return connectEtcd(o)
	case "bulk":
		return connectBulk(o)
	}
	return nil, fmt.Errorf("-system is etcd or bulk, not %q", o.system)
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "loadgen:", err)
	os.Exit(1)
}

// What the clients tell each other while they run.
type shared struct {
	start, end  time.Time // of the counted part
	lastSuccess int64     // Unix ns
	number      int64     // of the last claim
	errorCount  int64

	mutex     sync.Mutex
	gaps      [][2]float64
	errors    map[string]int
	latencies [][]time.Duration
	verified  int
	wrong     int
}

func run(o *options, clients []client) result {
	begin := time.Now()
	s := &shared{start: begin.Add(o.warmUp), errors: map[string]int{}, lastSuccess: begin.Add(o.warmUp).UnixNano()}
	s.end = s.start.Add(o.duration)
	var group sync.WaitGroup
	for i := range clients {
		group.Add(1)
		go func(i int) {
			defer group.Done()
			s.work(o, i, clients[i])
		}(i)
	}
	group.Wait()
	return s.result(o)
}

func (s *shared) work(o *options, index int, c client) {
	random := rand.New(rand.NewSource(time.Now().UnixNano() + int64(index)))
	value := make([]byte, o.valueSize)
	random.Read(value)
	latencies := make([]time.Duration, 0, 1<<14)
	share := o.keys / o.clients
	lastKey, lastNumber := -1, int64(-1)
	written := make([]byte, o.valueSize)
	for {
		sent := time.Now()
		if sent.After(s.end) {
			break
		}
		var err error
		var key int
		var number int64
		if o.op == "claim" {
			number = atomic.AddInt64(&s.number, 1)
			err = c.claim(number)
		} else {
			key = index + o.clients*random.Intn(share)
			stamp(value, sent.UnixNano())
			err = c.put(key, value)
		}
		now := time.Now()
		if err != nil {
			// A write whose answer never came may have happened: nothing can be said of its key.
			if key == lastKey {
				lastKey = -1
			}
			s.fault(err)
			time.Sleep(10 * time.Millisecond)
			continue
		}
		lastKey, lastNumber = key, number
		copy(written, value)
		if now.After(s.start) && !now.After(s.end) {
			latencies = append(latencies, now.Sub(sent))
			s.success(now)
		}
	}
	verified, wrong := 0, 0
	if (o.op == "put" && lastKey >= 0) || (o.op == "claim" && lastNumber >= 0) {
		if isThere, err := check(o, c, lastKey, written, lastNumber); err != nil {
			s.fault(fmt.Errorf("reading back: %v", err))
			wrong = 1
		} else if isThere {
			verified = 1
		} else {
			wrong = 1
		}
	}
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.latencies = append(s.latencies, latencies)
	s.verified += verified
	s.wrong += wrong
}

func check(o *options, c client, key int, written []byte, number int64) (bool, error) {
	if o.op == "claim" {
		return c.holds(number)
	}
	found, err := c.get(key)
	return string(found) == string(written), err
}

func stamp(value []byte, ns int64) {
	for i := 0; i < 8; i++ {
		value[i] = byte(ns >> (8 * i))
	}
}

func (s *shared) success(now time.Time) {
	at := now.UnixNano()
	before := atomic.SwapInt64(&s.lastSuccess, at)
	if gap := time.Duration(at - before); gap >= gapMin {
		s.mutex.Lock()
		defer s.mutex.Unlock()
		if len(s.gaps) < gapCountMax {
			s.gaps = append(s.gaps, [2]float64{float64(before) / 1e6, gap.Seconds() * 1e3})
		}
	}
}

func (s *shared) fault(err error) {
	atomic.AddInt64(&s.errorCount, 1)
	text := err.Error()
	if len(text) > 200 {
		text = text[:200]
	}
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if _, known := s.errors[text]; known || len(s.errors) < 10 {
		s.errors[text]++
	}
}

func (s *shared) result(o *options) result {
	var all []time.Duration
	for _, latencies := range s.latencies {
		all = append(all, latencies...)
	}
	sort.Slice(all, func(i, j int) bool { return all[i] < all[j] })
	at := func(share float64) float64 {
		if len(all) == 0 {
			return 0
		}
		return all[int(share*float64(len(all)-1))].Seconds() * 1e3
	}
	// The time since the last success is a gap as well.
	s.success(s.end)
	seconds := o.duration.Seconds()
	return result{
		System: o.system, Op: o.op, Clients: o.clients, Connections: o.connections,
		Count: len(all), Seconds: seconds, PerS: float64(len(all)) / seconds,
		P50Ms: at(0.5), P99Ms: at(0.99), MaxMs: at(1),
		ErrorCount: s.errorCount, Errors: s.errors,
		VerifiedCount: s.verified, WrongCount: s.wrong, Gaps: append([][2]float64{}, s.gaps...),
	}
}
