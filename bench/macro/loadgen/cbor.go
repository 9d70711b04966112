package main

import "fmt"

// Deterministic CBOR (RFC 8949 section 4.2.1): as much of it as requests need. Each function appends to `b`.

const (
	majorUint  = 0
	majorBytes = 2
	majorText  = 3
	majorArray = 4
	majorMap   = 5
	cborNull   = 0xf6
)

func appendHead(b []byte, major byte, n uint64) []byte {
	major <<= 5
	switch {
	case n < 24:
		return append(b, major|byte(n))
	case n < 1<<8:
		return append(b, major|24, byte(n))
	case n < 1<<16:
		return append(b, major|25, byte(n>>8), byte(n))
	case n < 1<<32:
		return append(b, major|26, byte(n>>24), byte(n>>16), byte(n>>8), byte(n))
	}
	return append(b, major|27, byte(n>>56), byte(n>>48), byte(n>>40), byte(n>>32), byte(n>>24), byte(n>>16), byte(n>>8), byte(n))
}

func appendUint(b []byte, n uint64) []byte { return appendHead(b, majorUint, n) }

func appendBytes(b, value []byte) []byte {
	return append(appendHead(b, majorBytes, uint64(len(value))), value...)
}

func appendText(b []byte, text string) []byte {
	return append(appendHead(b, majorText, uint64(len(text))), text...)
}

func appendArray(b []byte, n int) []byte { return appendHead(b, majorArray, uint64(n)) }

func appendMap(b []byte, n int) []byte { return appendHead(b, majorMap, uint64(n)) }

// decoder reads what answers hold: unsigned integers, byte and text strings, arrays, null, true and false.
type decoder struct {
	data []byte
	err  error
}

func (d *decoder) head() (major byte, n uint64) {
	if d.err != nil || len(d.data) == 0 {
		d.fail()
		return 0, 0
	}
	major, low := d.data[0]>>5, d.data[0]&31
	d.data = d.data[1:]
	if low < 24 {
		return major, uint64(low)
	}
	size := 1 << (low - 24)
	if low > 27 || len(d.data) < size {
		d.fail()
		return 0, 0
	}
	for _, octet := range d.data[:size] {
		n = n<<8 | uint64(octet)
	}
	d.data = d.data[size:]
	return major, n
}

func (d *decoder) fail() {
	if d.err == nil {
		d.err = fmt.Errorf("an answer that is not understood")
	}
	d.data = nil
}

func (d *decoder) number(wanted byte) uint64 {
	major, n := d.head()
	if major != wanted {
		d.fail()
	}
	return n
}

func (d *decoder) uint() uint64 { return d.number(majorUint) }

func (d *decoder) array() int { return int(d.number(majorArray)) }

func (d *decoder) text() string { return string(d.string(majorText)) }

func (d *decoder) bytes() []byte { return d.string(majorBytes) }

func (d *decoder) string(wanted byte) []byte {
	n := d.number(wanted)
	if d.err != nil || n > uint64(len(d.data)) {
		d.fail()
		return nil
	}
	taken := d.data[:n]
	d.data = d.data[n:]
	return taken
}

func (d *decoder) isNull() bool { return len(d.data) > 0 && d.data[0] == cborNull }
