/*
 * Text and numbers for the demonstration guests, on top of a `put_char` of theirs. To be included behind it, and behind
 * the types u8, u32 and u64.
 */
static void put(const char *s)
{
	for (; *s; s++)
		put_char(*s);
}

static void put_dec(u64 v)
{
	char digits[20];
	int n = 0;

	do {
		digits[n++] = (char)('0' + v % 10);
		v /= 10;
	} while (v);
	while (n)
		put_char(digits[--n]);
}

static void put_hex(u64 v)
{
	int shift = 60;

	put("0x");
	while (shift && !(v >> shift))
		shift -= 4;
	for (; shift >= 0; shift -= 4)
		put_char("0123456789abcdef"[v >> shift & 15]);
}
