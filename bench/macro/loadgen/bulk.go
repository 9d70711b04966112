package main

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"time"
)

const answerSizeMax = 1 << 20

// The lower bits of a request's id say whose it is.
const slotBits = 16

// A claim is decided in the final order only.
const levelFinal = 2

// bulkConnection is one stream to a node's bulk door (formation/node/bulk.py), shared by its clients.
type bulkConnection struct {
	stream net.Conn
	outbox chan []byte
	slots  []chan answer
	dead   chan struct{}
	err    error // why, once dead is closed
}

type answer struct {
	id   uint64
	rest []byte // behind the id
}

func (c *bulkConnection) writeLoop() {
	writer := bufio.NewWriterSize(c.stream, 64<<10)
	for frame := range c.outbox {
		writer.Write(frame)
		if len(c.outbox) == 0 {
			if err := writer.Flush(); err != nil {
				return // the reader notices as well
			}
		}
	}
}

func (c *bulkConnection) readLoop() {
	reader := bufio.NewReaderSize(c.stream, 64<<10)
	var head [4]byte
	for {
		if _, c.err = io.ReadFull(reader, head[:]); c.err != nil {
			break
		}
		size := binary.BigEndian.Uint32(head[:])
		if size > answerSizeMax {
			c.err = fmt.Errorf("an answer of %d bytes", size)
			break
		}
		payload := make([]byte, size)
		if _, c.err = io.ReadFull(reader, payload); c.err != nil {
			break
		}
		d := decoder{data: payload}
		d.array()
		id := d.uint()
		slot := id & (1<<slotBits - 1)
		if id == 0 {
			// The door does not understand us.
			d.text()
			c.err = fmt.Errorf("the door: %s", d.text())
			break
		}
		if d.err != nil || slot >= uint64(len(c.slots)) {
			c.err = fmt.Errorf("an answer to nobody")
			break
		}
		select {
		case c.slots[slot] <- answer{id, d.data}:
		default: // late, and its client does not wait for it any more
		}
	}
	close(c.dead)
}

type bulkClient struct {
	o          *options
	connection *bulkConnection
	slot       uint64
	answers    chan answer
	count      uint64
	accounts   []*account
	signer     *signer // nil: delegated
	run        uint64
	frame      []byte
	body       []byte
	intent     []byte
	timer      *time.Timer
}

func connectBulk(o *options) ([]client, error) {
	accounts, err := readAccounts(o.accounts)
	if err != nil {
		return nil, err
	}
	network, err := hex.DecodeString(o.network)
	if err != nil || (o.signed && len(network) != 32) {
		return nil, fmt.Errorf("-network is not 32 bytes in hex")
	}
	connections := make([]*bulkConnection, o.connections)
	for i := range connections {
		stream, err := net.Dial("unix", o.targets[i%len(o.targets)])
		if err != nil {
			return nil, err
		}
		connections[i] = &bulkConnection{stream: stream, outbox: make(chan []byte, 1024), dead: make(chan struct{})}
	}
	run := uint64(time.Now().UnixNano())
	clients := make([]client, o.clients)
	for i := range clients {
		c := connections[i%len(connections)]
		b := &bulkClient{
			o: o, connection: c, slot: uint64(len(c.slots)), answers: make(chan answer, 4), accounts: accounts,
			run: run, timer: time.NewTimer(time.Hour),
		}
		if o.signed {
			if b.signer, err = newSigner(network); err != nil {
				return nil, err
			}
		}
		c.slots = append(c.slots, b.answers)
		clients[i] = b
	}
	for _, c := range connections {
		go c.writeLoop()
		go c.readLoop()
	}
	return clients, nil
}

// begin starts a request's frame; `call` fills in its length.
func (c *bulkClient) begin(items int, name string) {
	c.count++
	c.frame = append(c.frame[:0], 0, 0, 0, 0)
	c.frame = appendArray(c.frame, items)
	c.frame = appendUint(c.frame, c.count<<slotBits|c.slot)
	c.frame = appendText(c.frame, name)
}

// call sends the frame and waits; what comes back is the answer's result, or its error.
func (c *bulkClient) call() (decoder, error) {
	id := c.count<<slotBits | c.slot
	binary.BigEndian.PutUint32(c.frame, uint32(len(c.frame)-4))
	if !c.timer.Stop() {
		select {
		case <-c.timer.C:
		default:
		}
	}
	c.timer.Reset(c.o.timeout)
	select {
	case c.connection.outbox <- c.frame:
	case <-c.connection.dead:
		return decoder{}, fmt.Errorf("connection: %v", c.connection.err)
	}
	for {
		select {
		case got := <-c.answers:
			if got.id != id {
				continue
			}
			return openAnswer(got.rest)
		case <-c.connection.dead:
			return decoder{}, fmt.Errorf("connection: %v", c.connection.err)
		case <-c.timer.C:
			// The frame may still be with the writer.
			c.frame = nil
			return decoder{}, fmt.Errorf("no answer in %v", c.o.timeout)
		}
	}
}

func openAnswer(rest []byte) (decoder, error) {
	d := decoder{data: rest}
	status := d.text()
	if d.err == nil && status != "ok" {
		message := d.text()
		return d, fmt.Errorf("%s: %s", status, message)
	}
	return d, d.err
}

// write sends one op, signed by its account or by the node under a delegation.
func (c *bulkClient) write(level uint64, a *account, verb, objectID string) error {
	if c.signer != nil {
		c.intent = c.signer.appendIntent(c.intent[:0], a, verb, objectID, c.body)
	}
	c.begin(4, "write")
	c.frame = appendUint(c.frame, level)
	c.frame = appendArray(c.frame, 1)
	if c.signer != nil {
		c.frame = appendBytes(c.frame, c.intent)
	} else {
		c.frame = appendText(appendArray(c.frame, 4), verb)
		c.frame = appendText(c.frame, objectID)
		c.frame = appendBytes(c.frame, c.body)
		c.frame = appendBytes(c.frame, a.publicKey)
	}
	_, err := c.call()
	return err
}

// read asks what is known of a key at a level.
func (c *bulkClient) read(what string, level uint64, key string) (decoder, error) {
	c.begin(5, "read")
	c.frame = appendText(c.frame, what)
	c.frame = appendUint(c.frame, level)
	c.frame = appendText(c.frame, key)
	return c.call()
}

// valueKey shares the keys out among the accounts, each of which may have so many.
func (c *bulkClient) valueKey(key int) (*account, string) {
	a := c.accounts[key%len(c.accounts)]
	return a, fmt.Sprintf("%s/k%08d", a.ID, key)
}

func (c *bulkClient) put(key int, value []byte) error {
	a, objectID := c.valueKey(key)
	c.body = appendBytes(appendText(appendMap(c.body[:0], 1), "value"), value)
	return c.write(c.o.level, a, "value.put", objectID)
}

func (c *bulkClient) get(key int) ([]byte, error) {
	_, objectID := c.valueKey(key)
	d, err := c.read("value", c.o.level, objectID)
	if err != nil || d.isNull() {
		return nil, err
	}
	found := d.bytes()
	return found, d.err
}

// claimID is a DNS name that nobody else of this run claims. An account may hold so many, so they take turns.
func (c *bulkClient) claimID(number int64) (*account, string) {
	return c.accounts[int(number)%len(c.accounts)], fmt.Sprintf("name/n%d.r%x.bench", number, c.run)
}

func (c *bulkClient) claim(number int64) error {
	a, objectID := c.claimID(number)
	c.body = appendText(appendText(appendMap(c.body[:0], 2), "note"), "")
	c.body = appendUint(appendText(c.body, "ttl_ms"), 0)
	return c.write(levelFinal, a, "claim.made", objectID)
}

func (c *bulkClient) holds(number int64) (bool, error) {
	a, objectID := c.claimID(number)
	d, err := c.read("claim", levelFinal, objectID)
	if err != nil || d.isNull() {
		return false, err
	}
	d.array()
	owner := d.text()
	return owner == a.ID, d.err
}
