"""Common English words of three to seven letters, none a palindrome."""

from __future__ import annotations

__all__ = ["WORDS"]

_TEXT = """
act add age air all and ant any ape apple arm army art ask aunt away axe baby back bad bag bake
ball band bank bar barn base bath beach bean bear beard bed bee beer begin bell belt bench bend
berry best big bike bill bird bite black blade blood blow blue board boat body boil bold bone book
boot born both bottle bottom bow bowl box boy brain branch brave bread break brick bridge bright
bring broom brother brown brush bucket build burn bus bush busy butter button buy cab cake call
calm camel camp can candle cap car card care carpet carry cart case castle cat catch cave chair
chalk change cheap cheese cherry chest chicken child circle city clay clean clear climb clock
close cloth cloud coal coast coat coffee coin cold comb come cook copper corn corner cost cotton
count country cover cow crab cream cross crowd crown cry cup curtain cut dance dark day deep deer
desert desk dig dinner dirt dish doctor dog doll donkey door double down dragon draw dream dress
drink drive drop drum dry duck dust eagle ear early earth east easy eat edge egg eight elbow empty
end engine enjoy enter even every face fact fair fall family far farm fast fat father fear feed
feel fence few field fight fill film find finger finish fire first fish five flag flat floor flour
flower fly fog fold food foot forest fork fox free fresh friend frog front fruit full funny garden
gate gentle giant gift girl give glad glass glove goat gold good goose grain grape grass gray
great green ground group grow guess guest hair half hall hammer hand happy hard hat hear heart
heavy help hen here hill hold hole home honey hope horn horse hot hotel hour house hungry hurry
ice inch ink iron island jacket jam jar job join joke juice jump jungle keep kettle key kind king
kitchen kite knee knife knock ladder lake lamp land large last late laugh law lazy leaf learn
leather leg lemon letter life lift light lion lip list little live loaf lock long look loud love
low lucky lunch machine mail make man map market mat meal meat meet melon metal middle milk mill
minute mirror miss mix money monkey month moon more morning most mother mouse mouth move mud music
nail name narrow near neck need needle nest net never new next nice night nine north nose note
number nurse oak ocean off oil old olive onion open orange other out oven over owl own page pain
paint pair palm pan paper parent park part party past path pay peace peach pear pen pencil people
pepper person picture pie pig pillow pilot pink pipe place plain plan plant plate play please plum
pocket poem point pond pony pool poor pot potato pound powder press pretty price prince proud pull
pump push put queen quick quiet rabbit race radio rain read ready real rest rice rich ride right
ring ripe river road robot rock roof room root rope rose rough round row rub rule run sad safe
sail salt same sand save say school sea season seat second secret seed sell send seven shade shake
shape share sharp sheep shelf shell shine ship shirt shoe shop short shout show sick side silk
silver simple sing sister sit six size skin skirt sky sleep slow small smart smell smile smoke
snake snow soap sock soft soil song soon sound soup south space spade speak spend spice spider
spoon sport spring square stamp stand star start station stay steam steel step stick still stone
stop store storm story stove street strong student sugar summer sun supper sweet swim table tail
tailor take talk tall tame taste tax teach team tell ten tent thick thin thing think thirsty three
throat throw thumb tiger time tin tired today toe tomato tongue tool tooth top touch towel tower
town toy track train travel tree trip truck true try tub tube tunnel turn twelve twenty two uncle
under use valley van vase village violin visit voice wait walk wall war warm wash watch water wave
wax way weak wear weather wedding week well west wet wheat wheel white whole wide wild win wind
window wine wing winter wipe wise wolf woman wood wool word work world worm write wrong yard year
yellow yes young zebra zero
"""

WORDS = tuple(_TEXT.split())
"""The split of a word does not depend on its position here."""
